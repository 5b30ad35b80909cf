"""Tokenization with labels: Manta's batches against one row at a time, as the guide does it.

    make bench
    python benchmarks/labels.py [--data FILE.jsonl] [--rows 4000]

Both arms produce the same labels, which is checked. They run interleaved, A B B A, in one process on one core; the
figure is the ratio of median tokens per second. Results go to benchmarks/results/<date>-labels.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import tokenizers
import transformers

from manta.data.tokenize import IGNORE, Encoder, load_tokenizer
from manta.demo import write_blank_model, write_data

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3


def one_by_one(tokenizer, inputs: list[str], outputs: list[str]) -> list[tuple[list[int], list[int]]]:
    """The guide's `__getitem__`, with EOS added: the whole text, then the prompt again for the length of its mask."""
    samples = []
    for prompt, answer in zip(inputs, outputs, strict=True):
        ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        masked = len(tokenizer(prompt)["input_ids"])
        samples.append((ids, [IGNORE] * masked + ids[masked:]))
    return samples


def batched(tokenizer, inputs: list[str], outputs: list[str]) -> list[tuple[list[int], list[int]]]:
    return [(sample.input_ids, sample.labels) for sample in Encoder(tokenizer)(inputs, outputs)]


def timed(arm, *arguments) -> tuple[float, list[tuple[list[int], list[int]]]]:
    start = time.perf_counter()
    samples = arm(*arguments)
    return sum(len(ids) for ids, _ in samples) / (time.perf_counter() - start), samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSONL with question and answer; default: the demo's questions")
    parser.add_argument("--rows", type=int, default=4000)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        corpus, questions = write_data(Path(folder))
        tokenizer = load_tokenizer(write_blank_model(Path(folder) / "blank", corpus))
        lines = (options.data or questions).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][: options.rows]
    arguments = (tokenizer, [row["question"] for row in rows], [row["answer"] for row in rows])

    speeds: dict[str, list[float]] = {"one by one": [], "Manta": []}
    arms = {"one by one": one_by_one, "Manta": batched}
    same = timed(one_by_one, *arguments)[1] == timed(batched, *arguments)[1]  # also the warm-up
    for _ in range(ROUNDS):
        for name in ("one by one", "Manta", "Manta", "one by one"):
            speeds[name].append(timed(arms[name], *arguments)[0])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    report = {
        "date": datetime.date.today().isoformat(),
        "rows": len(rows),
        "data": options.data.name if options.data else "demo questions",
        "same_labels": same,
        "tokens_per_second": medians,
        "ratio": medians["Manta"] / medians["one by one"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__}
        | {"transformers": transformers.__version__},
    }
    name = RESULTS / f"{report['date']}-labels"
    name.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = (
        f"# Tokenization with labels, {report['date']}\n\n"
        f"{report['rows']} rows of {report['data']}; {report['machine']}; the same labels: {same}.\n\n"
        "| arm | tokens/s (median) |\n|---|---|\n"
        + "".join(f"| {arm} | {speed:,.0f} |\n" for arm, speed in medians.items())
        + f"\nRatio: {report['ratio']:.2f}. Command: `make bench`.\n"
    )
    name.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
