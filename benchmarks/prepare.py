"""Preparation of a large JSONL: Manta's job against `datasets.map` one row at a time, in speed and memory.

    python benchmarks/prepare.py [--rows 1000000]

The row-by-row arm (render, tokenize the whole text, tokenize the prompt again for its mask, as the guide does) maps the
same file with as many processes as there are cores, before and after Manta's. The seconds of both are those of the
whole command: imports, the reading of the file, and for Manta Ray's start. Memory is the proportional set size of a
command and all processes it starts, looked at every two seconds. Labels of both arms are compared. Results go to
benchmarks/results/<date>-prepare.{json,md}.
"""

from __future__ import annotations

import argparse
import contextlib
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
from tempfile import TemporaryDirectory, TemporaryFile
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


def row_by_row(data: str, model: str, cache: str) -> None:
    """The other arm, in a process of its own: prints its first rows."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    source = datasets.load_dataset("json", data_files=data, split="train", cache_dir=cache)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = INPUT.format(**row), OUTPUT.format(**row)
        ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        masked = len(tokenizer(prompt)["input_ids"])
        return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}

    mapped = source.map(encode, num_proc=CORES, remove_columns=source.column_names, load_from_cache_file=False)
    print(json.dumps(mapped[:1000]))


def prepare(folder: Path) -> tuple[str, float, int]:
    """Run `manta prepare`: what it prints, wall seconds, and peak memory in bytes."""
    command = [sys.executable, "-m", "manta", "prepare", "--hf_model_id", str(folder / "base")]
    command += ["--hfdc_dataset_name", str(folder / "rows.jsonl"), "--data_dir", str(folder / "prepared")]
    command += ["--hfdc_input_template", INPUT, "--hfdc_output_template", OUTPUT]
    command += ["--hfdc_train_split_ratio", "1.0", "--hfdc_num_proc", str(CORES)]
    return run(command)


def _folder_of(folder: Path, output_template: str) -> str:
    """Where data prepared with this template is or would be."""
    from manta.config import Config
    from manta.data.prepare import locate

    data = {"dataset_name": str(folder / "rows.jsonl"), "input_template": INPUT, "output_template": output_template}
    settings = {"hf_model_id": str(folder / "base"), "data_dir": str(folder / "prepared")}
    data |= {"train_split_ratio": 1.0}
    return str(locate(Config.from_dict({**settings, "hf_dataset_config": data}))[0].path)


def run(command: list[str]) -> tuple[str, float, int]:
    """A command's output, wall seconds, and peak memory in bytes."""
    with TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, env=QUIET)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(psutil.Process(process.pid)))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
        seconds = time.perf_counter() - start
        assert process.returncode == 0
        output.seek(0)
        return output.read().strip(), seconds, peak


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
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", options.rows)
        write_tokenizer(folder / "rows.jsonl", folder / "base")
        other = [sys.executable, __file__, "--arm", str(folder / "rows.jsonl"), str(folder / "base")]
        before = run([*other, str(folder / "cache")])
        ours = prepare(folder)
        after = run([*other, str(folder / "cache")])
        again, second_start, _ = prepare(folder)
        changed = [_folder_of(folder, template) for template in (OUTPUT, f"{OUTPUT}.")]
        report = _report(options.rows, ours, [before, after]) | {
            "input_bytes": (folder / "rows.jsonl").stat().st_size,
            "second_start_seconds": second_start,
            "same_folder": again == ours[0],
            "other_folder_for_one_character": changed[0] == ours[0] != changed[1],
        }
    _write(report)


def _report(rows: int, ours: tuple[str, float, int], others: list[tuple[str, float, int]]) -> dict[str, Any]:
    from manta.data.prepare import Prepared

    prepared, seconds, peak = ours
    tokens = Prepared(Path(prepared)).counts["training"]["tokens"]
    samples = Prepared(Path(prepared)).tokenized("training")[:1000]
    first = json.loads(others[0][0].splitlines()[-1])
    other = statistics.median(arm[1] for arm in others)
    return {
        "date": datetime.date.today().isoformat(),
        "rows": rows,
        "tokens": tokens,
        "seconds": {"Manta": seconds, "datasets.map, row by row": [arm[1] for arm in others]},
        "peak_bytes": {"Manta": peak, "datasets.map, row by row": max(arm[2] for arm in others)},
        "same_labels": all(samples[column] == first[column] for column in ("input_ids", "labels")),
        "tokens_per_second_per_core": {
            "Manta": tokens / seconds / CORES,
            "datasets.map, row by row": tokens / other / CORES,
        },
        "ratio": other / seconds,
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
        + f"\nRatio: {report['ratio']:.2f}. Manta took {report['seconds']['Manta']:.0f} s with Ray's start, and at most"
        f" {report['peak_bytes']['Manta'] / 2**30:.2f} GiB in all its processes. A second start takes the folder in "
        f"{report['second_start_seconds']:.1f} s; one changed character in a template makes another: "
        f"{report['other_folder_for_one_character']}.\n\nCommand: `python benchmarks/prepare.py`.\n"
    )
    name.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        row_by_row(*sys.argv[2:5])
    else:
        main()
