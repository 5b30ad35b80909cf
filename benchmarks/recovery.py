"""From a killed worker to the first new step: Manta against stock Ray Train, interleaved in one run.

    python benchmarks/recovery.py [--kills 3] [--quick]

The stock arm is a TorchTrainer with the usual train function: transformers' Trainer, Ray's `prepare_trainer` and
`RayTrainReportCallback`, resumed from `ray.train.get_checkpoint()`, with Ray's own intervals. Both fine-tune every
weight of the same small model on the same tokens with two workers, and save every 20 steps. The arms run in the order
A B B A; in each, the worker of rank 1 gets SIGKILL again and again. Looked at from outside: the end of the other
worker, the birth of the new processes, the begin of their train function, the first new step. Results go to
benchmarks/results/<date>-recovery.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from report import about, publish, where

from faults.bench import Bench
from faults.job import Job, kill_marked, marks
from running import lines, prepared_of

SAVE, BATCH, ACCUMULATION = 20, 2, 6
SETTLED_S = 60.0  # from an attempt's first step to its kill, at least: by then Manta's spares are ready, as hours later
PARTS = {
    "ended": "detection and shutdown: until the other worker is gone",
    "born": "until the new processes are there",
    "entered": "Python, imports, process group: until the train function runs (Manta: knows what to go on from)",
    "stepped": "checkpoint, model, first step",
}


def stock(folder: str, base: str, data: str, kind: str) -> None:
    """The other arm's driver."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        stock_train_func,
        train_loop_config={"folder": folder, "base": base, "data": data, "lora": kind == "lora"},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="stock",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=1000),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def stock_train_func(config: dict[str, Any]) -> None:
    from pathlib import Path

    import ray.train
    from datasets import load_from_disk
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    def tell(**about: Any) -> None:
        rank = ray.train.get_context().get_world_rank()
        line = json.dumps({"time": time.time(), "pid": os.getpid(), "rank": rank, **about})
        with (Path(config["folder"]) / f"rank{rank}.jsonl").open("a") as file:
            file.write(line + "\n")

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tell(step=state.global_step)

    tell(step=None)
    model = AutoModelForCausalLM.from_pretrained(config["base"])
    if config["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    arguments = TrainingArguments(
        output_dir=config["folder"] + "/output",
        max_steps=100_000,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        save_strategy="steps",
        save_steps=SAVE,
        logging_steps=10,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = load_from_disk(config["data"]).select_columns(["input_ids", "labels"])
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(config["base"]), padding=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.add_callback(RayTrainReportCallback())
    trainer.add_callback(Tell())
    trainer = prepare_trainer(trainer)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as path:
            trainer.train(resume_from_checkpoint=str(Path(path) / RayTrainReportCallback.CHECKPOINT_NAME))
    else:
        trainer.train()


class Stock:
    """The stock run, looked at like a Job."""

    def __init__(self, bench: Bench, folder: Path, kind: str):
        config = bench.config(kind)
        self.folder, self.mark = folder, f"stock-{folder.name}"
        folder.mkdir()
        self.ray_folder = tempfile.mkdtemp(prefix="mf")
        tokens = prepared_of(config).tokenized("training")
        tokens.save_to_disk(str(folder / "data"))
        self.command = [sys.executable, __file__, "--stock", str(folder), config.hf_model_id]
        self.command += [str(folder / "data"), kind]

    def __enter__(self) -> Stock:
        quiet = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "RAY_worker_niceness": "0"}
        environment = {**os.environ, **quiet, **marks(self.mark), "RAY_TMPDIR": self.ray_folder}
        with (self.folder / "out").open("wb") as output:
            self.driver = subprocess.Popen(self.command, env=environment, stdout=output, stderr=output)
        return self

    def __exit__(self, *error: object) -> None:
        kill_marked(self.mark)

    def pids(self, since: float) -> dict[int, float]:
        """Processes whose train function began after `since`, and when."""
        told = [line for rank in (0, 1) for line in lines(self.folder / f"rank{rank}.jsonl")]
        return {line["pid"]: line["time"] for line in told if line["step"] is None and line["time"] > since}

    def steps(self, since: float) -> list[float]:
        told = [line for line in lines(self.folder / "rank0.jsonl") if line["step"] and line["time"] > since]
        new = self.pids(since)
        return [line["time"] for line in told if line["pid"] in new]


class Manta:
    """Manta's run, looked at in the same way."""

    def __init__(self, bench: Bench, name: str, kind: str):
        settings = {"save_steps": SAVE, "max_steps": 100_000, "max_failures": 1000, "logging_steps": 1}
        self.job = Job(bench.config(kind, run_name=name, **settings), bench.folder)

    def __enter__(self) -> Manta:
        self.job.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.job.__exit__()

    def pids(self, since: float) -> dict[int, float]:
        new = [event for event in self.job.events("attempt") if event["time"] > since]
        return {worker["pid"]: event["time"] for event in new for worker in event["workers"]}

    def steps(self, since: float) -> list[float]:
        new = {event["attempt"] for event in self.job.events("attempt") if event["time"] > since}
        return [line["time"] for line in self.job.losses() if line["attempt"] in new]


def measure(arm: Stock | Manta, kills: int, rng: random.Random) -> Iterator[dict[str, float]]:
    """Kill the worker of rank 1 at random steps; seconds from each kill to what follows."""
    began = 0.0
    for _ in range(kills):
        began, found = _kill(arm, began, rng.randrange(SAVE, 2 * SAVE))
        yield found


def _kill(arm: Stock | Manta, began: float, after: int) -> tuple[float, dict[str, float]]:
    """Kill once, so many steps after the first of the attempt that began after `began`."""
    _until(lambda: len(arm.steps(began)) >= after and time.time() > arm.steps(began)[0] + SETTLED_S, 240)
    pids = list(arm.pids(began))
    survivor, victim = psutil.Process(pids[0]), psutil.Process(pids[1])
    killed = time.time()
    victim.kill()
    while survivor.is_running() and time.time() < killed + 120:
        time.sleep(0.02)
    ended = time.time()
    _until(lambda: arm.steps(killed), 240)
    new = arm.pids(killed)
    moments = {
        "ended": ended,
        "born": max(killed, *(psutil.Process(pid).create_time() for pid in new)),
        "entered": max(new.values()),
        "stepped": min(arm.steps(killed)),
    }
    return killed, {name: moment - killed for name, moment in moments.items()}


def _until(what: Any, limit: float) -> None:
    end = time.monotonic() + limit
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing for {limit} s")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="In each of the four runs  [3]")
    parser.add_argument("--kind", choices=["full", "lora"], default="full", help="  [full]")
    parser.add_argument("--quick", action="store_true", help="One run of each arm with one kill; writes nothing")
    options = parser.parse_args()
    rng = random.Random("recovery")
    times: dict[str, list[dict[str, float]]] = {"Manta": [], "stock Ray Train": []}
    with tempfile.TemporaryDirectory(prefix="manta-recovery-") as name:
        bench = Bench(Path(name))
        for number, arm in enumerate("AB" if options.quick else "ABBA"):
            label = "Manta" if arm == "A" else "stock Ray Train"
            folder = bench.folder / f"stock{number}"
            run = Manta(bench, f"manta{number}", options.kind) if arm == "A" else Stock(bench, folder, options.kind)
            with run as started:
                for found in measure(started, 1 if options.quick else options.kills, rng):
                    times[label].append(found)
                    print(label, {part: round(seconds, 1) for part, seconds in found.items()}, flush=True)
    report = {
        **about("ray", "torch", "transformers"),
        "kind": options.kind,
        "seconds_from_kill": times,
        "median": {arm: _medians(each) for arm, each in times.items()},
    }
    ours, theirs = (report["median"][arm]["stepped"] for arm in times)
    report["ratio"] = ours / theirs
    _write(report, not options.quick)


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(one[part] for one in times) for part in PARTS}


def _write(report: dict[str, Any], to_files: bool) -> None:
    medians = report["median"]
    spread = {arm: [one["stepped"] for one in each] for arm, each in report["seconds_from_kill"].items()}
    text = (
        f"# From a killed worker to the first new step, {report['date']}\n\n"
        f"Two workers, {report['kind']} fine-tuning of a small model; {where(report)}; "
        f"{len(next(iter(spread.values())))} kills in each arm, the arms interleaved A B B A; medians of seconds "
        "since the kill.\n\n| | "
        + " | ".join(medians)
        + " |\n|---|"
        + "---|" * len(medians)
        + "\n"
        + "".join(
            f"| {label} | " + " | ".join(f"{medians[arm][part]:.1f}" for arm in medians) + " |\n"
            for part, label in PARTS.items()
        )
        + f"\nManta's time is {report['ratio']:.2f} of stock's. From lowest to highest: "
        + ", ".join(f"{arm} {min(each):.1f} to {max(each):.1f}" for arm, each in spread.items())
        + ".\n\nCommand: `python benchmarks/recovery.py`.\n"
    )
    publish("recovery", report, text, to_files)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stock"]:
        stock(*sys.argv[2:6])
    else:
        main()
