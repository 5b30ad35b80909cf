"""Faults of worker processes: killed, ended, frozen, stuck, out of step."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil

from faults.bench import WEIGHTS, Bench, Row
from faults.job import Job

KILLED = "worker SIGKILL, segfault, OOM kill"
SAVING = "kill in the middle of a save"
SIGTERM = "worker SIGTERM / node drain (preemption)"
DAMAGE = "bit flip or truncation in any checkpoint file"


def workers(bench: Bench) -> None:
    """One LoRA run that is hurt again and again, at random steps."""
    rng = random.Random("workers")
    rows: list[Row] = []
    with bench.job("workers") as job:
        for fault, injected, number in (
            (KILLED, "SIGKILL (as the kernel's OOM killer sends), LoRA", signal.SIGKILL),
            (KILLED, "SIGSEGV, LoRA", signal.SIGSEGV),
            (SIGTERM, "SIGTERM to a worker, LoRA", signal.SIGTERM),
            ("frozen process (SIGSTOP)", "SIGSTOP, LoRA", signal.SIGSTOP),
        ):
            with bench.row(fault, injected) as row:
                rows.append(row)
                job.ensure_running()
                job.steps_more(rng.randrange(3, 9))
                signal_worker(job, row, rng.randrange(2), number)
                row.must((row.wasted_steps or 0) <= 1, f"{row.wasted_steps} wasted steps")
        with bench.row(SAVING, "SIGKILL of all workers in a save, LoRA") as row:
            rows.append(row)
            job.ensure_running()
            kill_in_save(job, row)
        end(bench, job, rows)


def full(bench: Bench) -> None:
    """Full fine-tuning, without copies in memory: what is on disk must do."""
    rng = random.Random("full")
    rows: list[Row] = []
    with bench.job("full", "full", step_copies="off") as job:
        with bench.row(KILLED, "SIGKILL, full fine-tuning, copies off") as row:
            rows.append(row)
            job.ensure_running()
            job.steps_more(rng.randrange(11, 16))
            signal_worker(job, row, rng.randrange(2), signal.SIGKILL)
        with bench.row(DAMAGE, "bit flip in the newest checkpoint, then SIGKILL of a worker") as row:
            rows.append(row)
            job.ensure_running()
            job.until(lambda: len(job.run.checkpoints()) > 1, 60)
            newest = job.run.checkpoints()[-1]
            name = flip(newest.path, rng)
            job.steps_more(4)  # away from where the next kill comes: a step that fails twice ends a run
            signal_worker(job, row, rng.randrange(2), signal.SIGKILL, intervals=2)
            start = job.events("attempt")[-1]["step"]
            row.notes.append(f"{newest.path.name}/{name} → from step {start}")
            row.must(start < newest.step, f"goes on from step {start}")
            row.must(any(newest.path.name in note for note in job.notes()), "no note names the damaged checkpoint")
        with bench.row(SAVING, "SIGKILL of all workers in a save, full fine-tuning") as row:
            rows.append(row)
            job.ensure_running()
            kill_in_save(job, row)
        end(bench, job, rows, "full")


def signal_worker(job: Job, row: Row, rank: int, number: signal.Signals, intervals: int = 1) -> None:
    """At most so many save intervals are lost."""
    pid, now, step = job.worker(rank), time.time(), job.step()
    os.kill(pid, number)
    try:
        row.wasted_steps, row.seconds_to_new_step = job.recovery(now)
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)  # what comes next needs a run that goes on
        raise
    births = [psutil.Process(worker["pid"]).create_time() for worker in job.events("attempt")[-1]["workers"]]
    row.notes.append(
        f"rank {rank} at step {step}; {sum(birth < now for birth in births)} of the new processes were spares"
    )
    row.must((row.wasted_steps or 0) <= intervals * job.config.save_steps, f"{row.wasted_steps} wasted steps")


def kill_in_save(job: Job, row: Row) -> None:
    job.steps_more(2)  # beyond the step that was hurt before: one that fails twice ends the run
    pids = job.freeze_in_save()
    now = time.time()
    (unfinished,) = job.unfinished()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    row.wasted_steps, row.seconds_to_new_step = job.recovery(now)
    row.notes.append(f"in {unfinished.name}")
    # From the checkpoint before: an interval, and what was trained while the save went on.
    row.must((row.wasted_steps or 0) < 2 * job.config.save_steps, f"{row.wasted_steps} wasted steps")


def end(bench: Bench, job: Job, rows: list[Row], kind: str = "lora", weights: float | None = WEIGHTS) -> None:
    """Let the run come to its end and compare; what is wrong with the end is wrong with each of its faults."""
    try:
        job.ensure_running()
        job.finish()
        orphans = [path.name for path in job.unfinished()]
        for row in rows:
            row.must(not orphans, f"{orphans} are left without a manifest")
        bench.compare(job, rows, kind, weights=weights)
    except Exception as error:
        for row in rows:
            row.problems.append(f"the run does not end: {error}")


def flip(checkpoint: Path, rng: random.Random) -> str:
    """Flip one bit of one file of a checkpoint; its name."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json")
    chosen = rng.choice(files)
    content = bytearray(chosen.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    chosen.write_bytes(content)
    return str(chosen.relative_to(checkpoint))


def loader(bench: Bench) -> None:
    """One worker on two CPUs, so that it loads in a process of its own."""
    with (
        bench.job(
            "loader",
            num_workers=1,
            resources_per_worker={"CPU": 2},
            dataloader_num_workers=1,
            stop_at_step=30,
        ) as job,
        bench.row("killed data-loader process", "SIGKILL of a data-loader process") as row,
    ):
        job.ensure_running()
        job.steps_more(6)
        children = psutil.Process(job.worker(0)).children()
        loaders = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        row.must(loaders, "the worker has no loader process")
        now = time.time()
        loaders[0].kill()
        row.wasted_steps, row.seconds_to_new_step = job.recovery(now)
        row.must(row.wasted_steps <= 10, f"{row.wasted_steps} wasted steps")
        job.finish()
        bench.compare(job, [row], weights=None)
