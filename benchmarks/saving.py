"""What saving costs a training: checkpoints written beside it or not, and copies after each step on or off.

    python benchmarks/saving.py [--quick]

A model of which a full checkpoint is about 100 MB, two cores. The arms are runs of their own, interleaved A B B A.

1. Save stall: for how long a save keeps the training loop waiting (`save_stall_s` of the checkpoint events, without
   each run's first save), `--async_save true` against `false`, full fine-tuning and LoRA; medians. To check that figure
   from outside, what a save adds to the time between two steps: with one worker, which leaves a core free as the host's
   are beside a GPU, and with two, where training and saving share both cores and nothing can be gained.
2. Copies after each step: seconds of a step (median of the times between log lines), `--step_copies every` against
   `off`, LoRA, two workers, a step of about a second; and what is lost when a worker is killed at a random step.

Results go to benchmarks/results/<date>-saving.{json,md}.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from report import about, publish, where

from faults.bench import Bench
from faults.job import Job
from tiny import tiny_model

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "attention_dropout": 0.1}
LARGE = {"lora_rank": 64, "lora_target_modules": "all-linear"}  # a save that takes a while
USUAL = {"lora_rank": 8, "lora_target_modules": "all-linear"}  # of a model this small still 5 % of its weights


def train(bench: Bench, name: str, kind: str, **settings: Any) -> Job:
    with bench.job(name, kind, **settings) as job:
        job.start()
        job.finish(400)
    return job


def gaps(job: Job) -> dict[int, float]:
    """Seconds from the log line of the step before to that of each step, without the first three."""
    told = {line["step"]: line["time"] for line in job.losses()}
    return {step: told[step] - told[step - 1] for step in told if step > 4}


def stalls(bench: Bench, kind: str, workers: int, order: str, saves: int) -> dict[str, Any]:
    """Seconds of stall of each save, and what a save adds to the steps around it, for both arms."""
    every = 5
    found: dict[str, list[float]] = {"async": [], "sync": []}
    added: dict[str, list[float]] = {"async": [], "sync": []}
    size = 0
    for number, arm in enumerate("async" if letter == "A" else "sync" for letter in order):
        settings = {"async_save": arm == "async", "save_steps": every, "max_steps": every * (saves + 1)}
        settings |= {"num_workers": workers, "nominal_workers": workers, "step_copies": "off"}
        name = f"{kind}{workers}-{arm}-{number}"
        job = train(bench, name, kind, **LARGE, gradient_accumulation_steps=2, **settings)
        found[arm] += [event["save_stall_s"] for event in job.events("checkpoint")[1:]]
        between = gaps(job)
        plain = statistics.median(seconds for step, seconds in between.items() if step % every not in (0, 1))
        # A save falls after its step's log line, so that it is in the next one's time.
        added[arm] += [seconds - plain for step, seconds in between.items() if step % every == 1 and step > every + 1]
        latest = job.run.latest()
        size = sum(path.stat().st_size for path in latest.path.rglob("*") if path.is_file()) if latest else 0
    medians = {arm: statistics.median(each) for arm, each in found.items()}
    return {
        "checkpoint_bytes": size,
        "stall_s": found,
        "median_stall_s": medians,
        "ratio": medians["sync"] / max(medians["async"], 1e-9),
        "median_added_to_next_step_s": {arm: statistics.median(each) for arm, each in added.items()},
    }


def copies(bench: Bench, order: str, steps: int, accumulation: int) -> dict[str, Any]:
    """Seconds of a step with and without copies."""
    found: dict[str, list[float]] = {"every": [], "off": []}
    for number, arm in enumerate("every" if letter == "A" else "off" for letter in order):
        settings: dict[str, Any] = {"step_copies": arm, "save_steps": 1000, "max_steps": steps}
        settings |= {**USUAL, "gradient_accumulation_steps": accumulation}
        job = train(bench, f"copies-{arm}-{number}", "lora", **settings)
        found[arm] += [seconds for step, seconds in gaps(job).items() if step < steps]
    medians = {arm: statistics.median(each) for arm, each in found.items()}
    return {"step_s": found, "median_step_s": medians, "cost": medians["every"] / medians["off"] - 1}


def killed(bench: Bench, accumulation: int, kills: int) -> dict[str, Any]:
    """A worker is killed at random moments: wasted steps and seconds to the first new one, each time."""
    rng, lost = random.Random("killed"), []
    with bench.job(
        "killed", "lora", **USUAL, gradient_accumulation_steps=accumulation, save_steps=1000, max_steps=1000
    ) as job:
        job.ensure_running()
        for _ in range(kills):
            job.steps_more(rng.randrange(3, 9))
            time.sleep(rng.random())
            now = time.time()
            os.kill(job.worker(rng.randrange(2)), signal.SIGKILL)
            lost.append(job.recovery(now))
    return {"wasted_steps": [steps for steps, _ in lost], "seconds_to_new_step": [seconds for _, seconds in lost]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="One short run of each arm; writes nothing")
    parser.add_argument("--accumulation", type=int, default=8, help="Of the second part: sets its step time  [8]")
    options = parser.parse_args()
    order, saves, steps, kills = ("AB", 2, 10, 1) if options.quick else ("ABBA", 6, 40, 3)
    with TemporaryDirectory(prefix="manta-saving-") as name:
        bench = Bench(Path(name))
        tiny_model(bench.folder / "base", **SHAPE)
        report: dict[str, Any] = {
            **about("manta-train", "ray", "torch", "transformers", "peft"),
            "stall": {},
        }
        for kind, workers in (("full", 1), ("lora", 1), ("full", 2)):
            case = f"{kind}, {workers} worker{'s' * (workers > 1)}"
            report["stall"][case] = stalls(bench, kind, workers, order, saves)
            print(case, report["stall"][case], flush=True)
        report["copies"] = copies(bench, order, steps, options.accumulation)
        report["killed"] = killed(bench, options.accumulation, kills)
    _write(report, not options.quick)


def _write(report: dict[str, Any], to_files: bool) -> None:
    copied, lost = report["copies"], report["killed"]
    text = (
        f"# What saving costs, {report['date']}\n\n{where(report)}; arms interleaved A B B A, medians.\n\n"
        "| | checkpoint | stall, asynchronous | stall, synchronous | ratio | added to the next step, asynchronous / "
        "synchronous |\n|---|---|---|---|---|---|\n"
        + "".join(
            f"| {kind} | {part['checkpoint_bytes'] / 1e6:.0f} MB | {part['median_stall_s']['async'] * 1e3:.1f} ms | "
            f"{part['median_stall_s']['sync'] * 1e3:.1f} ms | {part['ratio']:.0f} | "
            f"{part['median_added_to_next_step_s']['async'] * 1e3:.0f} / "
            f"{part['median_added_to_next_step_s']['sync'] * 1e3:.0f} ms |\n"
            for kind, part in report["stall"].items()
        )
        + f"\nCopies after each step, LoRA, 2 workers: {copied['median_step_s']['every']:.3f} s a step with, "
        f"{copied['median_step_s']['off']:.3f} s without: {copied['cost']:+.1%}. Worker killed at "
        f"{len(lost['wasted_steps'])} random moments, no checkpoint on disk: wasted steps {lost['wasted_steps']}, "
        f"seconds to the first new step {[round(seconds, 1) for seconds in lost['seconds_to_new_step']]}.\n\n"
        "Command: `python benchmarks/saving.py`.\n"
    )
    publish("saving", report, text, to_files)


if __name__ == "__main__":
    main()
