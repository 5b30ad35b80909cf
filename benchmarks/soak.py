"""A long training under faults: the end must be that of the undisturbed run, and what it cost is said.

    python benchmarks/soak.py [--minutes 30] [--every 60] [--seed 0] [--elastic] [--quick]

One LoRA run with two workers, its steps made long by its batch. Its number of steps comes from the step time of the
undisturbed run, measured first. A fault is drawn by the seed from those that can hit a running job about every
`--every` seconds, once the one before is overcome. At the end weights, losses and the ledger are compared with the
undisturbed run of the same steps. Goodput is the time that the kept steps take undisturbed, over the wall time. With
`--elastic` the run has 1 to 2 workers on a Ray cluster of two nodes, and the faults of nodes are drawn as well. Results
go to benchmarks/results/<date>-soak.{json,md}.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from report import about, publish, where

from faults.bench import LOSS, WEIGHTS, Bench, Row
from faults.disk import filled, small_disk
from faults.job import Job
from faults.nodes import Nodes
from faults.workers import flip
from manta.snapshot import NAME as SNAPSHOT


@dataclass
class Soak:
    """The run, where it runs, and what happened to it."""

    job: Job
    rng: random.Random
    disk: Path
    nodes: Nodes | None
    faults: list[dict[str, Any]] = field(default_factory=list)


def _signal(soak: Soak, number: signal.Signals) -> float:
    pid = soak.job.worker(soak.rng.randrange(len(soak.job.events("attempt")[-1]["workers"])))
    now = time.time()
    os.kill(pid, number)
    return now


def worker_sigkill(soak: Soak) -> float:
    return _signal(soak, signal.SIGKILL)


def worker_segfault(soak: Soak) -> float:
    return _signal(soak, signal.SIGSEGV)


def worker_sigstop(soak: Soak) -> float:
    return _signal(soak, signal.SIGSTOP)


def worker_sigterm(soak: Soak) -> float:
    return _signal(soak, signal.SIGTERM)


def driver_sigterm(soak: Soak) -> float:
    assert soak.job.driver
    now = time.time()
    soak.job.driver.terminate()
    soak.job.wait(90)
    soak.job.start()
    return now


def driver_sigkill(soak: Soak) -> float:
    now = soak.job.kill_driver()
    soak.job.start()
    return now


def snapshot_cut(soak: Soak) -> float:
    now = soak.job.kill_driver()
    path = soak.job.run.path / SNAPSHOT
    with contextlib.suppress(FileNotFoundError):
        path.write_bytes(path.read_bytes()[:200])
    soak.job.start()
    return now


def bit_flip(soak: Soak) -> float:
    """In the newest checkpoint, and a killed worker, and in a second of two cases a killed driver."""
    if newest := soak.job.run.latest():
        flip(newest.path, soak.rng)
    return driver_sigkill(soak) if soak.rng.random() < 0.5 else worker_sigkill(soak)


def disk_full(soak: Soak) -> float:
    """For some seconds; the run goes on by itself or by the same command."""
    with filled(soak.disk):
        time.sleep(8)
    return time.time()


def node_killed(soak: Soak) -> float:
    """One of two nodes; it comes back 20 to 40 seconds later."""
    assert soak.nodes
    now = soak.nodes.kill(soak.nodes.nodes.pop())
    _overcome(soak.job, now)
    time.sleep(soak.rng.uniform(5, 20))
    now = time.time()
    soak.nodes.nodes.append(soak.nodes.add())
    return now


def node_drained(soak: Soak) -> float:
    """One of two nodes is told to leave, leaves at its deadline, and another one comes."""
    assert soak.nodes
    leaving = soak.nodes.nodes.pop()
    soak.nodes.drain(leaving.node_id, 8)
    time.sleep(8)
    now = soak.nodes.kill(leaving)
    soak.nodes.nodes.append(soak.nodes.add())
    return now


ANYWHERE: list[Callable[[Soak], float]] = [
    *(worker_sigkill, worker_segfault, worker_sigstop, worker_sigterm, driver_sigterm, driver_sigkill),
    *(snapshot_cut, bit_flip, disk_full),
]
OF_NODES: list[Callable[[Soak], float]] = [node_killed, node_drained]


def _overcome(job: Job, since: float, limit: float = 180) -> dict[str, Any]:
    """The first step of an attempt that began after `since`; or of the same one, if it goes on for 20 steps."""
    attempts = [event["attempt"] for event in job.events("attempt") if event["time"] <= since]

    def new() -> dict[str, Any] | None:
        later = [line for line in job.losses() if line["time"] > since]
        restarted = [line for line in later if line["attempt"] > max(attempts, default=0)]
        return next(iter(restarted), None) or (later[-1] if len(later) > 20 else None)

    return job.until(new, limit)


def hurt(soak: Soak, minutes: float, every: float, last: int) -> None:
    """Draw faults until the time is over or the run is near its end."""
    kinds = ANYWHERE + (OF_NODES if soak.nodes else [])
    bag: list[Callable[[Soak], float]] = []
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and soak.job.step() < last:
        time.sleep(soak.rng.uniform(0.6, 1.0) * every)
        if soak.job.driver and soak.job.driver.poll() == 0:
            return
        if not bag:  # each kind once before any comes again
            bag = soak.rng.sample(kinds, len(kinds))
        fault = bag.pop()
        step, before = soak.job.step(), len(soak.job.events("attempt"))
        about: dict[str, Any] = {"fault": fault.__name__, "at_step": step, "problem": None}
        try:
            soak.job.ensure_running()
            since = fault(soak)
            soak.job.ensure_running()
            about["seconds"] = round(_overcome(soak.job, since)["time"] - since, 1)
        except (TimeoutError, RuntimeError, OSError, AssertionError) as error:
            about["problem"] = f"{type(error).__name__}: {error}"[:400]
            with contextlib.suppress(Exception):  # the same command is what a user would try
                if soak.job.driver and soak.job.driver.poll() is None:
                    soak.job.kill_driver()
                soak.job.ensure_running()
        about["attempts"] = len(soak.job.events("attempt")) - before
        soak.faults.append(about)
        print(about, flush=True)


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bench = Bench(folder)
    disk = folder / "disk"
    shape = {"gradient_accumulation_steps": options.accumulation, "save_steps": 20, "max_failures": 1000}
    with contextlib.ExitStack() as stack:
        stack.enter_context(small_disk(disk, "64m"))
        probe = stack.enter_context(bench.job("probe", **shape, max_steps=30))
        probe.start()
        probe.finish(300)
        step_s = _step_seconds(probe)
        steps = max(60, int(60 * options.minutes * options.share / step_s))
        print(f"{step_s:.3f} s a step undisturbed: {steps} steps", flush=True)
        undisturbed = stack.enter_context(bench.job("undisturbed", **shape, max_steps=steps))
        nodes = stack.enter_context(Nodes(2)) if options.elastic else None
        where = {"cluster": nodes.cluster.address, "num_workers": "1:2", "resize_check_s": 3} if nodes else {}
        job = stack.enter_context(bench.job("soak", **shape, max_steps=steps, results_dir=str(disk), **where))
        began = time.monotonic()
        run = Soak(job, random.Random(options.seed), disk, nodes)
        job.ensure_running()
        hurt(run, options.minutes, options.every, steps - 60)
        if job.driver and job.driver.poll() != 0:
            job.ensure_running()
        job.finish(60 * options.minutes + 600)
        wall = time.monotonic() - began
        undisturbed.start()
        undisturbed.finish(60 * options.minutes + 600)
        step_s = _step_seconds(undisturbed)
        row = Row("soak", "")
        weights = None if options.elastic else WEIGHTS
        bench.compare(job, [row], weights=weights, reference=undisturbed.run)
        return {
            **about("manta-train", "ray", "torch", "transformers", "peft"),
            "minutes": wall / 60,
            "steps": steps,
            "step_seconds": step_s,
            "elastic": options.elastic,
            "seed": options.seed,
            "goodput": steps * step_s / wall,
            "faults": run.faults,
            "samples_lost": row.samples_lost,
            "samples_repeated": row.samples_repeated,
            "max_loss_gap": row.max_loss_gap,
            "max_weight_gap": row.max_weight_gap,
            "problems": row.problems + [f"{one['fault']}: {one['problem']}" for one in run.faults if one["problem"]],
        }


def _step_seconds(job: Job) -> float:
    """Wall seconds of a step of an undisturbed run, saves included, without the first steps."""
    lines = job.losses()[3:]
    return (lines[-1]["time"] - lines[0]["time"]) / (len(lines) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="Of training under faults, about  [30]")
    parser.add_argument("--every", type=float, default=60, help="Seconds between faults, about  [60]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--elastic", action="store_true", help="1 to 2 workers on two Ray nodes that come and go")
    parser.add_argument("--accumulation", type=int, default=10, help="Micro-batches a step and worker  [10]")
    parser.add_argument("--share", type=float, default=0.8, help="Of the time that is expected to be of use  [0.8]")
    parser.add_argument("--quick", action="store_true", help="Three minutes; writes nothing")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.every = 3, 20
    with TemporaryDirectory(prefix="manta-soak-") as name:
        report = soak(options, Path(name))
    _write(report, not options.quick)
    sys.exit(bool(report["problems"]))


def _write(report: dict[str, Any], to_files: bool) -> None:
    counted = Counter(one["fault"] for one in report["faults"])
    seconds = {name: [one.get("seconds") for one in report["faults"] if one["fault"] == name] for name in counted}
    medians = {name: statistics.median(known) for name, each in seconds.items() if (known := [s for s in each if s])}
    kind = "1 to 2 workers on two Ray nodes" if report["elastic"] else "two workers"
    gap = report["max_weight_gap"]
    text = (
        f"# A run under faults, {report['date']}\n\n"
        f"LoRA, {kind}, {report['steps']} steps of {report['step_seconds']:.2f} s, {report['minutes']:.0f} minutes, "
        f"{len(report['faults'])} faults drawn by seed {report['seed']}; {where(report)}"
        ".\n\n| fault | times | median s to the first new step |\n|---|---|---|\n"
        + "".join(
            f"| {name} | {count} | {f'{medians[name]:.1f}' if name in medians else ''} |\n"
            for name, count in sorted(counted.items())
        )
        + "\nAgainst the undisturbed run: "
        f"{report['samples_lost']} samples lost, {report['samples_repeated']} repeated; "
        f"largest difference of a step's loss {report['max_loss_gap']:.1e} (at most {LOSS:g}), of a weight "
        f"{'not compared' if gap is None else f'{gap:.1e}'}. Goodput: {report['goodput']:.1%} (the kept steps' "
        "undisturbed time over the wall time).\n\n"
        + "".join(f"- {problem}\n" for problem in report["problems"])
        + "\nCommand: `python benchmarks/soak.py`.\n"
    )
    publish("soak-elastic" if report["elastic"] else "soak", report, text, to_files)


if __name__ == "__main__":
    main()
