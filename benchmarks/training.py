"""Fine-tuning side by side: Manta, TRL, and the guide's code, on the same tokens with the same model.

    python benchmarks/training.py [--data gsm8k alpaca] [--arms …] [--steps 10] [--warm_up 2] [--dtype auto]
                                 [--dropout 0] [--one_way] [--full_ft] [--quick]

A Llama of 135 million random weights, LoRA of rank 16 on every projection, batches of 8 samples, two cores. The arms
run in the order A B C … C B A, or with `--one_way` as they are given, each in a process of its own; Manta as `manta
train` runs it, and the guide's code, on Ray Train. Tokens per second are tokens that are no padding, by the time
between the ends of steps, `--warm_up` of them left out; the median of the runs. `--dtype auto` is what Manta takes on
this CPU, also for the peers; `guide` computes in bfloat16 wherever it is, as it is written: a quarter of an hour a step
on a CPU that has to emulate it, where it has to be asked for. The compiled arm goes over the same samples until its
layers have been compiled and judged, and is timed from there on. `manta with glibc as it is` leaves it a heap for each
thread, tcache and fastbins. Memory is the peak of the process that trains. `--dropout 0.1` is the guide's and
Manta's default; then the peers drop other elements, so that losses are near and not equal. Results go to
benchmarks/results/<date>-training-*.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from report import about, publish, where

from manta import heap
from manta.config import Config
from running import order_of, prepared_of
from tiny import tiny_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
SETS: dict[str, dict[str, Any]] = {
    "gsm8k": {"file": DATA / "gsm8k/train.jsonl", "input": "Question: {question}\nAnswer: ", "output": "{answer}"},
    "alpaca": {"file": DATA / "chat/alpaca_en_demo.json", "input": "{instruction}\n{input}\n", "output": "{output}"},
}
ARMS = {
    "manta": {},
    "manta packed": {"packing": True},
    "manta full-checkpointing": {"gradient_checkpointing": "full"},
    "manta with glibc as it is": {"variables": {heap.ARENAS: "16", heap.TUNABLES: "glibc.malloc.tcache_count=7"}},
    "manta compiled": {"torch_compile": True, "max_steps": 18},
    "manta packed selective-checkpointing": {"packing": True, "gradient_checkpointing": "selective"},
    "manta packed full-checkpointing": {"packing": True, "gradient_checkpointing": "full"},
    "trl padded": {},
    "trl packed": {"packing": True},
    "trl packed, no checkpointing": {"packing": True, "checkpointing": False},
    "guide": {"dtype": "bfloat16"},
    "guide float32": {"dtype": "float32"},
}
# In each step, and the same labels.
SAME_SAMPLES = ("manta", "manta full-checkpointing", "manta with glibc as it is", "trl padded")
BATCH, LENGTH, RANK, SEED, RATE = 8, 1024, 16, 7, 1e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP, COMPILED = 2, 13  # steps that are not timed; with --torch_compile, those until the layers were judged


def make_model(folder: Path, quick: bool) -> None:
    """The shape of SmolLM-135M, with a tokenizer trained on what is measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    text = [each["file"].read_text(encoding="utf-8")[:2_000_000] for each in SETS.values() if each["file"].exists()]
    tokenizer = tiny_tokenizer(folder, text, vocab_size=8192)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    if not quick:
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape,
        vocab_size=49152,
        num_key_value_heads=shape["num_attention_heads"] // (1 if quick else 3),
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def config_of(folder: Path, name: str, options: argparse.Namespace, run: str, **more: Any) -> Config:
    data = SETS[name]
    return Config.from_dict(
        {
            "hf_model_id": str(folder / "model"),
            "max_steps": options.steps,
            "max_seq_length": LENGTH,
            "per_device_train_batch_size": 1 if more.get("packing") else BATCH,
            "gradient_accumulation_steps": 1,
            "learning_rate": RATE,
            "min_learning_rate": 0,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0,
            "lora_rank": RANK,
            "lora_alpha": RANK,
            "lora_dropout": options.dropout,
            "full_ft": options.full_ft,
            "dtype": options.dtype,
            "seed": SEED,
            "logging_steps": 1,
            "eval_steps": 0,
            "num_workers": 1,
            "resources_per_worker": {"CPU": 2},
            "dataloader_num_workers": 0,
            "save_steps": 1000,
            "results_dir": str(folder / "results"),
            "data_dir": str(folder / "prepared"),
            "run_name": run,
            "lint": {"duplicates": "off"},
            "hf_dataset_config": {
                "dataset_name": str(folder / f"{name}.jsonl"),
                "input_template": data["input"],
                "output_template": data["output"],
                "train_split_ratio": 1.0,
                "num_proc": 1,
            },
            **more,
        }
    )


def write_data(folder: Path, name: str, options: argparse.Namespace) -> None:
    """The rows of every step, and for the peers the tokens that Manta makes of them, in the order it takes them."""
    import random

    from manta.data import prepare

    text = SETS[name]["file"].read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    rows = random.Random(SEED).sample(rows, options.steps * BATCH)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(folder, name, options, "tokens")
    prepared, parts = prepare.locate(config)
    prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
    tokenized, order = prepared_of(config).tokenized("training"), order_of(config)
    texts = {line["row"]: line for line in map(json.loads, prepared.text("training").read_text().splitlines())}
    taken = [tokenized[row] for step in range(options.steps) for row in order.micro_batch(step, 0)]
    with (folder / f"{name}-tokens.jsonl").open("w") as tokens, (folder / f"{name}-rows.jsonl").open("w") as plain:
        for row in taken:
            tokens.write(json.dumps({key: list(row[key]) for key in ("input_ids", "labels")}) + "\n")
            plain.write(json.dumps({key: texts[row["row"]][key] for key in ("input", "output")}) + "\n")


def run_manta(
    folder: Path, name: str, arm: str, options: argparse.Namespace, number: int, more: dict[str, Any]
) -> dict[str, Any]:
    run = f"{name}-{arm.replace(' ', '-').replace(',', '')}-{number}"
    more = dict(more)
    variables = more.pop("variables", {})
    config = config_of(folder, name, options, run, **more)
    recipe = folder / f"{run}.yaml"
    recipe.write_text(config.dump())
    started = time.time()
    with (folder / f"{run}.log").open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("manta"), "train", "--config", recipe],
            env={**os.environ, **variables},
            stdout=log,
            stderr=log,
        )
        peak = Peak(process.pid)
        if process.wait():
            raise SystemExit((folder / f"{run}.log").read_text()[-3000:])
    lines = [json.loads(line) for line in (folder / "results" / run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    tokens = [step_tokens(folder, config, step) for step in range(config.max_steps)]
    result = json.loads((folder / "results" / run / "result.json").read_text())
    return {
        "started": started,
        "times": [line["time"] for line in lines],
        "tokens": tokens,
        "losses": [line["loss"] for line in lines],
        "warm_up": COMPILED if config.torch_compile else options.warm_up,
        "peak_bytes": peak.stop(),
        "seconds": result["seconds"],
    }


def step_tokens(folder: Path, config: Config, step: int) -> int:
    from manta.data.batches import SampleOrder

    lengths, micros = prepared_of(config).sequences, config.micro_batches(config.num_workers)
    order = SampleOrder(len(lengths), config.per_device_train_batch_size, micros, config.seed)
    return int(lengths[order.step(step)].sum())


class Peak:
    """The largest resident set of any worker below a process, as the kernel keeps it."""

    def __init__(self, pid: int):
        self.process, self.most, self.ended = psutil.Process(pid), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.ended.wait(0.5):
            try:
                for child in self.process.children(recursive=True):
                    if "RayTrainWorker" in " ".join(child.cmdline()):
                        status = Path(f"/proc/{child.pid}/status").read_text()
                        kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
                        self.most = max(self.most, int(kilobytes) * 1024)
            except (psutil.Error, OSError, StopIteration):
                continue

    def stop(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.most


def run_peer(
    folder: Path, name: str, arm: str, options: argparse.Namespace, number: int, more: dict[str, Any]
) -> dict[str, Any]:
    job = {
        "model": str(folder / "model"),
        "folder": str(folder / "peer"),
        "tokens": str(folder / f"{name}-tokens.jsonl"),
        "rows": str(folder / f"{name}-rows.jsonl"),
        "report": str(folder / f"{name}-{arm}-{number}.json"),
        "steps": options.steps,
        "batch": 1 if more.get("packing") else BATCH,
        "length": LENGTH,
        "rank": RANK,
        "targets": TARGETS,
        "dropout": options.dropout,
        "seed": SEED,
        "learning_rate": RATE,
        "dtype": options.dtype,
        "full_ft": options.full_ft,
        "cuda": False,
        "packing": False,
        "checkpointing": True,
        **more,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, Path(__file__).with_name("peers.py"), arm.split()[0], path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {"warm_up": options.warm_up, **json.loads(Path(job["report"]).read_text())}


def rate(report: dict[str, Any]) -> float:
    """Tokens per second of a run, warm-up left out."""
    times, tokens, first = report["times"], report["tokens"], report.get("warm_up", WARM_UP)
    return sum(tokens[first:]) / (times[-1] - times[first - 1])


def chosen(dtype: str) -> str:
    """The precision in which Manta computes on this CPU."""
    from manta.model import computes_bfloat16

    return dtype if dtype != "auto" else "bfloat16" if computes_bfloat16("cpu") else "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm_up", type=int, default=WARM_UP, help="steps that are not timed")
    parser.add_argument("--rounds", type=int, default=1, help="times there and back")
    parser.add_argument("--one_way", action="store_true", help="the arms as given, in which one may be twice")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--dropout", type=float, default=0.0, help="before the adapters, in every arm")
    parser.add_argument("--full_ft", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a model of two layers, nothing written")
    options = parser.parse_args()
    report = about("torch", "transformers", "peft", "trl", "accelerate", "ray")
    asked, options.dtype = options.dtype, chosen(options.dtype)
    options.arms = options.arms or [arm for arm in ARMS if arm != "guide" or chosen("auto") == "bfloat16"]
    report["options"] = {**vars(options), "dtype": asked}
    with tempfile.TemporaryDirectory(prefix="manta-bench-", dir="/tmp") as name:
        folder = Path(name)
        make_model(folder / "model", options.quick)
        for data in options.data:
            write_data(folder, data, options)
            back = [] if options.one_way else reversed(options.arms)
            order = [*options.arms, *back] * options.rounds
            runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
            for arm in order:
                run = run_manta if arm.startswith("manta") else run_peer
                runs[arm].append(run(folder, data, arm, options, len(runs[arm]), ARMS[arm]))
                print(f"{data}, {arm}: {rate(runs[arm][-1]):,.0f} tok/s", file=sys.stderr, flush=True)
            report[data] = runs
    dropout = ["dropout"] * (options.dropout > 0)
    kind = "-".join(["full" if options.full_ft else "lora", *dropout, asked, *options.data])
    publish(f"training-{kind}", report, told(report, options), to_files=not options.quick)


def told(report: dict[str, Any], options: argparse.Namespace) -> str:
    written = " `guide` is in bfloat16, as it is written." if "guide" in options.arms else ""
    lines = [
        f"# Training side by side, {report['date']}",
        "",
        f"{'Full fine-tuning' if options.full_ft else 'LoRA'}, {options.dtype}, {where(report)}. `python benchmarks/"
        f"training.py {shlex.join(sys.argv[1:])}`. Loss gap: the largest "
        "difference of a step's loss from Manta's on the same samples; packed arms have other samples in a step."
        f"{written}",
    ]
    for data in options.data:
        lines += ["", f"## {data}", "", "| arm | real tok/s | Manta is faster by | peak memory, MiB | loss gap |"]
        lines.append("|---|---|---|---|---|")
        rates = {arm: statistics.median(map(rate, runs)) for arm, runs in report[data].items()}
        ours_rate = rates.get("manta") or max(value for arm, value in rates.items() if arm.startswith("manta"))
        for arm, runs in report[data].items():
            peak = statistics.median(run["peak_bytes"] for run in runs) / 2**20
            gap = ""
            if "manta" in report[data] and arm in SAME_SAMPLES:
                ours, theirs = report[data]["manta"][0]["losses"], runs[-1]["losses"]
                gap = f"{max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e}"
            faster = "" if arm == "manta" else f"{ours_rate / rates[arm]:.2f}×"
            lines.append(f"| {arm} | {rates[arm]:,.0f} | {faster} | {peak:,.0f} | {gap} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
