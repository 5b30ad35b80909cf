"""Faults that come with the settings, the data or the model: told at once or at their step, and not tried again."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import torch

from faults.bench import Bench, Row, tiny_model_once
from faults.job import Job
from manta.config import Config
from manta.runs import Run
from running import small_config, write_rows
from tiny import tiny_model

BAD_ROWS = "bad rows: invalid JSON/UTF-8, empty, overlong, wrong fields"
TRUNCATED = "truncated dataset or weights file"
CONFIG = "wrong config"
NON_FINITE = "NaN/inf loss or gradient"


def quick(folder: Path, name: str, **settings: Any) -> Config:
    """A short run of its own data and model in `folder`."""
    data = {"train_split_ratio": 1.0, **settings.pop("data", {})}
    defaults: dict[str, Any] = {"eval_steps": 0, "save_steps": 2, "max_failures": 5, "lora_dropout": 0.0}
    known = {key: value for key, value in (defaults | settings).items() if key in Config.model_fields}
    return small_config(folder, run_name=name, **known, data=data)


def mention(folder: Path, number: int, word: str) -> None:
    """Put `word` into one row of the data."""
    path = folder / "rows.jsonl"
    rows = write_rows(path).read_text().splitlines()
    rows[number] = rows[number].replace("the capital", f"the {word} capital")
    path.write_text("\n".join(rows) + "\n")


def refused(bench: Bench, row: Row, config: Config, folder: Path, *flags: str, code: int = 2) -> str:
    """The message of a command that must end before a worker starts, and that the user must act on."""
    row.user_actions = 1
    with bench.running(config, folder) as job:
        done = job.again(*flags)
        row.must(done.returncode == code, f"it exits with {done.returncode}: {done.stderr[-300:]}")
        message = next((line for line in done.stderr.splitlines()[::-1] if line.startswith(("manta: ", "Error: "))), "")
        row.must(message and "Traceback" not in done.stderr, f"no message of one line: {done.stderr[-300:]}")
        row.must(not job.events("attempt"), "workers were started")
        row.notes.append(message)
        return message


def non_finite(bench: Bench) -> None:
    """One word's embedding is NaN: training is well until the one row with this word."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = bench.folder / "nan"
    base = Path(tiny_model(folder / "base", tie_word_embeddings=False))
    mention(folder, 17, "~")
    (rare,) = AutoTokenizer.from_pretrained(base)("~")["input_ids"]
    state = load_file(base / "model.safetensors")
    state["model.embed_tokens.weight"][rare] = float("nan")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})

    with bench.row(NON_FINITE, "NaN from one row's word") as row, bench.running(quick(folder, "stop"), folder) as job:
        job.start()
        row.user_actions = 1
        row.must((code := job.wait(120)) == 1, f"it exits with {code}")
        step, rows = named(job)
        row.notes.append(f"step {step}, source rows {rows}")
        row.must(step and 17 in rows, f"it says {job.said(300)}")
        row.must(len(job.events("attempt")) == 1, "it was tried again")
        row.must(step == max((line["step"] for line in job.losses()), default=0) + 1, "a step after it was made")
        row.must(all(found.step < (step or 0) for found in job.run.checkpoints()), "its step was saved")
        row.must(finite(job.run), "weights that are not finite were saved")
    with bench.row(NON_FINITE, "the same with --non_finite skip, one epoch") as row:
        row.must("non_finite" in Config.model_fields, "there is no setting non_finite")
        with bench.running(quick(folder, "skip", non_finite="skip"), folder) as job:
            job.start()
            job.finish(150)
            row.must((job.run.result() or {}).get("skipped_steps") == 1, f"result.json: {job.run.result()}")
            row.must(finite(job.run), "weights that are not finite were saved")


def named(job: Job) -> tuple[int | None, list[int]]:
    """Step and source rows that the message names."""
    found = re.search(r"step (\d+) is nan", job.said()), re.search(r"rows\s+\[([\d,\s]+)\]", job.said())
    step = int(found[0].group(1)) if found[0] else None
    return step, [int(number) for number in found[1].group(1).split(",")] if found[1] else []


def finite(run: Run) -> bool:
    from safetensors.torch import load_file

    files = [file for found in run.checkpoints() for file in (found.path / "model").glob("*.safetensors")]
    return all(bool(torch.isfinite(tensor).all()) for file in files for tensor in load_file(file).values())


def repeated(bench: Bench) -> None:
    """The tokenizer knows a word that the model does not: the row with it fails whenever its step is tried."""
    from transformers import AutoTokenizer

    folder = bench.folder / "repeated"
    base = tiny_model(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    mention(folder, 17, "<new>")
    fault = "error that repeats at the same step"
    with bench.row(fault, "a token beyond the embedding") as row, bench.running(quick(folder, "rare"), folder) as job:
        job.start()
        row.user_actions = 1
        row.must((code := job.wait(180)) == 1, f"it exits with {code}")
        row.must((tries := len(job.events("attempt"))) == 2, f"{tries} attempts")
        row.must("index out of range" in job.said(), f"it says {job.said(300)}")
        row.notes.append(job.said(300))


def bad_rows(bench: Bench) -> None:
    folder = bench.folder / "bad"
    folder.mkdir()
    good = write_rows(folder / "rows.jsonl", 60).read_bytes()
    bad = [b'{"question": "a", "ans', b'{"question": "\xff\xfe", "answer": "b"}', b'{"asked": "a"}', b"[1, 2]"]
    empty, overlong = b'{"question": "", "answer": ""}', json.dumps({"question": "a", "answer": "b c " * 200}).encode()
    (folder / "rows.jsonl").write_bytes(good + b"\n".join([*bad, empty, overlong]) + b"\n")
    settings = {"overlong_policy": "drop", "stop_at_step": 2}
    with bench.row(BAD_ROWS, "all of them, allowed: counted, put aside, trained without") as row:
        config = quick(folder, "allowed", bad_rows_limit=0.2, **settings)
        with bench.running(config, folder) as job:
            job.start()
            job.finish(120)
            prepared = Path(json.loads((job.run.path / "data.json").read_text())["prepared"])
            counts = json.loads((prepared / "manifest.json").read_text())["counts"]
            aside = [path for path in prepared.rglob("*quarantine*") if path.is_file()]
            kept = "".join(path.read_text(errors="replace") for path in aside).count("\n")
            row.notes.append(f"{counts.get('quarantined')} put aside in {[path.name for path in aside]}")
            unanswered = counts["noted"]["empty_output"]["rows"]  # one has no answer, the other another field
            row.must((counts["quarantined"], unanswered) == (len(bad) - 1, 2), f"counted: {counts}")
            row.must(kept == counts.get("quarantined"), f"{kept} lines are kept in {aside}")
    with bench.row(BAD_ROWS, "the same with the limit of 1 %: refused") as row:
        message = refused(bench, row, quick(folder, "refused", **settings), folder)
        row.must("bad_rows_limit" in message, f"it says {message}")


def truncated(bench: Bench) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = bench.folder / "truncated"
    folder.mkdir()
    text = write_rows(folder / "rows.jsonl").read_text()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in text.splitlines()]), folder / "whole.parquet")
    (folder / "rows.parquet").write_bytes((folder / "whole.parquet").read_bytes()[:-500])
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-200])
    weights = Path(tiny_model(folder / "cut")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    tiny_model_once(folder / "base")
    for name in ("rows.parquet", "rows.jsonl.gz"):
        with bench.row(TRUNCATED, name) as row:
            config = quick(folder, name.replace(".", "-"), data={"dataset_name": str(folder / name)})
            row.must(name in (said := refused(bench, row, config, folder)), f"it says {said}")
    with bench.row(TRUNCATED, "model.safetensors") as row:
        said = refused(bench, row, quick(folder, "weights", hf_model_id=str(folder / "cut")), folder)
        row.must("model.safetensors" in said, f"it says {said}")


def wrong_config(bench: Bench) -> None:
    folder = bench.folder / "wrong"
    folder.mkdir()
    for flags, word in (
        (("--learning_rat", "1e-4"), "--learning_rate"),
        (("--lora_target_modules", "q_proj,qkv"), "lora_target_modules"),
    ):
        with bench.row(CONFIG, " ".join(flags)) as row:
            said = refused(bench, row, quick(folder, "wrong"), folder, *flags)
            row.must(word in said, f"it says {said}")
            row.must(not (folder / "results").exists(), "a run was begun")
