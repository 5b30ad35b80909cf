"""Preparation of a large JSONL: Manta's job against `datasets.map` one row at a time, in speed and memory.

    python benchmarks/prepare.py [--rows 1000000] [--row_by_row 200000]

The row-by-row arm (render, tokenize the whole text, tokenize the prompt again for its mask, as the guide does) maps
the first `--row_by_row` rows of the same file with as many processes as there are cores, and runs before and after
Manta's; its imports and the reading of the file are not counted. Manta's seconds are those of the whole command. Memory
is the proportional set size of the command and all processes it starts, Ray's included, looked at twice a second.
Labels of both arms are compared. Results go to benchmarks/results/<date>-prepare.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

RESULTS = Path(__file__).parent / "results"
CORES = os.cpu_count() or 1
QUIET = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
INPUT, OUTPUT = "### Question:\n{question}\n### Answer:\n", "{answer}"


def write_rows(path: Path, rows: int) -> None:
    """Questions and answers of uneven length, of words as frequent as Zipf's law has them."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(draw.choice(letters[:18], draw.integers(2, 10))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, rows, 10_000):
            count = min(10_000, rows - first)
            lengths = np.clip(draw.lognormal(2.8, 0.7, (count, 2)).astype(int), 3, 300)
            picked = iter((draw.zipf(1.3, int(lengths.sum())) - 1) % len(words))
            for question, answer in lengths.tolist():
                texts = [" ".join(words[next(picked)] for _ in range(size)) for size in (question, answer)]
                file.write(json.dumps({"question": f"{texts[0]}?", "answer": f"{texts[1]}."}) + "\n")


def write_tokenizer(data: Path, folder: Path) -> None:
    """A byte-level BPE of 16,384 tokens, trained on the first rows."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    with data.open(encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(20_000), strict=False)]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(lines, 16_384, special_tokens=["<|endoftext|>"], show_progress=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(str(folder))


def row_by_row(data: str, model: str, rows: int, cache: str) -> None:
    """The other arm, in a process of its own: prints its tokens and seconds."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    source = datasets.load_dataset("json", data_files=data, split=f"train[:{rows}]", cache_dir=cache)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = INPUT.format(**row), OUTPUT.format(**row)
        ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        masked = len(tokenizer(prompt)["input_ids"])
        return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}

    start = time.perf_counter()
    mapped = source.map(encode, num_proc=CORES, remove_columns=source.column_names, load_from_cache_file=False)
    seconds = time.perf_counter() - start
    tokens = sum(map(len, mapped.with_format("numpy")["input_ids"]))
    print(json.dumps({"tokens": tokens, "seconds": seconds, "first": mapped[:1000]}))


def prepare(folder: Path, output_template: str = OUTPUT) -> tuple[Path, float, float]:
    """Run `manta prepare`: its folder, wall seconds, and peak memory in bytes."""
    command = [sys.executable, "-m", "manta", "prepare", "--hf_model_id", str(folder / "base")]
    command += ["--hfdc_dataset_name", str(folder / "rows.jsonl"), "--data_dir", str(folder / "prepared")]
    command += ["--hfdc_input_template", INPUT, "--hfdc_output_template", output_template]
    command += ["--hfdc_train_split_ratio", "1.0", "--hfdc_num_proc", str(CORES)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=QUIET)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _memory(psutil.Process(process.pid)))
        time.sleep(0.5)
    seconds = time.perf_counter() - start
    assert process.returncode == 0 and process.stdout
    return Path(process.stdout.read().strip()), seconds, peak


def _memory(process: psutil.Process) -> int:
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for each in family:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # ended meanwhile
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--row_by_row", type=int, default=200_000, help="rows of the other arm")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", options.rows)
        size = (folder / "rows.jsonl").stat().st_size
        write_tokenizer(folder / "rows.jsonl", folder / "base")
        arguments = [str(folder / "rows.jsonl"), str(folder / "base"), str(options.row_by_row), str(folder / "cache")]
        others: list[dict[str, Any]] = []
        for turn in ("row by row", "Manta", "row by row"):
            if turn == "Manta":
                prepared, seconds, peak = prepare(folder)
                continue
            command = [sys.executable, __file__, "--arm", *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=QUIET)
            others.append(json.loads(done.stdout.splitlines()[-1]))
        again, second_start, _ = prepare(folder)
        changed, _, _ = prepare(folder, f"{OUTPUT} ") if options.rows <= 20_000 else (None, 0, 0)
        report = _report(options, prepared, seconds, peak, others)
        report |= {"input_bytes": size, "second_start_seconds": second_start, "same_folder": again == prepared}
        if changed:
            report["other_folder_for_one_character"] = changed != prepared
    _write(report)


def _report(
    options: argparse.Namespace, prepared: Path, seconds: float, peak: float, others: list[dict[str, Any]]
) -> dict[str, Any]:
    from manta.data.prepare import Prepared

    counts = Prepared(prepared).counts["training"]
    samples = Prepared(prepared).tokenized("training")[:1000]
    same = all(samples[column] == others[0]["first"][column] for column in ("input_ids", "labels"))
    speed = counts["tokens"] / seconds / CORES
    other = statistics.median(arm["tokens"] / arm["seconds"] / CORES for arm in others)
    return {
        "date": datetime.date.today().isoformat(),
        "rows": options.rows,
        "tokens": counts["tokens"],
        "seconds": seconds,
        "peak_bytes": peak,
        "same_labels": same,
        "tokens_per_second_per_core": {"Manta": speed, "datasets.map, row by row": other},
        "ratio": speed / other,
        "machine": f"{platform.machine()}, {CORES} cores",
        "versions": {name: version(name) for name in ("ray", "datasets", "tokenizers", "transformers")},
    }


def _write(report: dict[str, Any]) -> None:
    name = RESULTS / f"{report['date']}-prepare"
    name.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    speeds = report["tokens_per_second_per_core"]
    text = (
        f"# Preparation of {report['rows']:,} rows, {report['date']}\n\n"
        f"{report['input_bytes'] / 1e6:,.0f} MB of JSONL, {report['tokens']:,} tokens; {report['machine']}; "
        f"labels of the first 1,000 rows are the same: {report['same_labels']}.\n\n"
        "| arm | tokens/s per core |\n|---|---|\n"
        + "".join(f"| {arm} | {speed:,.0f} |\n" for arm, speed in speeds.items())
        + f"\nRatio: {report['ratio']:.2f}. Manta took {report['seconds']:.0f} s with Ray's start, and at most "
        f"{report['peak_bytes'] / 2**30:.2f} GiB in all its processes. A second start takes the folder in "
        f"{report['second_start_seconds']:.1f} s.\n\nCommand: `python benchmarks/prepare.py`.\n"
    )
    name.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        row_by_row(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
