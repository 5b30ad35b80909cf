"""Faults of the driver, and of what it finds when the same command is given again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from faults.bench import Bench, Row
from faults.job import Job
from faults.workers import DAMAGE, SAVING, end, flip
from manta import manifest
from manta.outcome import ASKED_TO_STOP
from manta.runs import Checkpoint
from manta.snapshot import NAME as SNAPSHOT

AGAIN = "driver killed, same command again"
LIST = "snapshot truncated, listed directory missing"


def drivers(bench: Bench) -> None:
    """One run: two commands at a time, and SIGTERM and SIGKILL to the driver, each followed by the same command."""
    rows: list[Row] = []
    with bench.job("drivers", save_steps=5) as job:
        with bench.row("two drivers, one run name", "the same command beside the first") as row:
            rows.append(row)
            job.ensure_running()
            second = job.again()
            holder = f"process {job.driver.pid} on" if job.driver else ""
            row.must(second.returncode == 2, f"the second exits with {second.returncode}")
            row.must(holder in second.stderr and "Traceback" not in second.stderr, f"it says {second.stderr[-300:]}")
        with bench.row(AGAIN, "SIGTERM to the driver") as row:
            rows.append(row)
            job.ensure_running()
            job.steps_more(7)
            assert job.driver
            now = time.time()
            job.driver.terminate()
            code = job.wait(60)
            row.must(code == ASKED_TO_STOP, f"it exits with {code}")
            job.start()
            row.wasted_steps, row.seconds_to_new_step = job.recovery(now)
            row.must(row.wasted_steps == 0, f"{row.wasted_steps} wasted steps")
        for fault, injected, hurt in (
            (AGAIN, "SIGKILL to the driver", _nothing),
            (LIST, "driver SIGKILL, Ray's snapshot cut to 200 bytes", _cut_snapshot),
            (LIST, "driver SIGKILL, newest listed checkpoint deleted", _delete_newest),
            (DAMAGE, "driver SIGKILL, a file of the newest checkpoint cut by a byte", _cut_a_file),
        ):
            with bench.row(fault, injected) as row:
                rows.append(row)
                job.ensure_running()
                job.steps_more(8)
                kill_and_start(job, row, hurt)
        with bench.row(SAVING, "SIGKILL of driver and workers in a save") as row:
            rows.append(row)
            job.ensure_running()
            for pid in job.freeze_in_save():
                os.kill(pid, signal.SIGKILL)
            kill_and_start(job, row, _nothing)
        end(bench, job, rows)
        with bench.row(AGAIN, "the command of a finished run") as row:
            before = job.run.result_file.read_text(), len(job.events("attempt"))
            done = job.again()
            row.must(done.returncode == 0, f"it exits with {done.returncode}")
            row.must((job.run.result_file.read_text(), len(job.events("attempt"))) == before, "it trained again")
        every_file(bench, job)


def kill_and_start(job: Job, row: Row, hurt: Callable[[Job], list[str]]) -> None:
    """Kill the driver, hurt what it left, give the same command; each word that `hurt` returns must be in a note."""
    noted, now = len(job.notes()), job.kill_driver()
    words = hurt(job)
    newest = job.run.latest()
    job.start()
    row.wasted_steps, row.seconds_to_new_step = job.recovery(now, 120)
    start = job.events("attempt")[-1]["step"]
    row.notes += [f"from step {start}", *job.notes()[noted:]]
    row.must(newest is None or start >= newest.step - job.config.save_steps, f"goes on from step {start}")
    row.must(row.wasted_steps <= 2 * job.config.save_steps, f"{row.wasted_steps} wasted steps")
    for word in words:
        row.must(any(word in note for note in job.notes()[noted:]), f"no note says {word!r}")


def _nothing(job: Job) -> list[str]:
    return []


def _cut_snapshot(job: Job) -> list[str]:
    path = job.run.path / SNAPSHOT
    path.write_bytes(path.read_bytes()[:200])
    return ["list of checkpoints"]


def _delete_newest(job: Job) -> list[str]:
    shutil.rmtree(_newest(job).path)
    return ["list of checkpoints"]


def _cut_a_file(job: Job) -> list[str]:
    newest = _newest(job).path
    path = random.Random("cut").choice(_files(newest))
    path.write_bytes(path.read_bytes()[:-1])
    return [newest.name, path.name]


def _newest(job: Job) -> Checkpoint:
    newest = job.run.latest()
    assert newest
    return newest


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != manifest.NAME)


def every_file(bench: Bench, job: Job) -> None:
    """Each file of a checkpoint in turn: a bit flipped, cut, deleted. The command that verifies is run for one."""
    rng = random.Random("every file")
    with bench.row(DAMAGE, "each file in turn: bit flipped, cut, deleted; found by its hash") as row:
        newest = _newest(job).path
        for path in [*_files(newest), newest / manifest.NAME]:
            content = path.read_bytes()
            flipped = bytearray(content)
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            for what, damaged in (
                ("flipped", bytes(flipped)),
                ("cut", content[: len(content) // 2]),
                ("deleted", None),
            ):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                found = manifest.damage(newest)
                # A bit of the manifest's own figures, such as a metric, says nothing about the files.
                if path.name != manifest.NAME or what != "flipped":
                    row.must(found, f"{path.name} {what} is not found")
            path.write_bytes(content)
        row.must(manifest.damage(newest) is None, "a whole checkpoint is taken for damaged")
        name = flip(newest, rng)
        command = [sys.executable, "-m", "manta", "runs", "verify", str(job.run.path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=bench.folder, timeout=60)
        row.must(done.returncode and Path(name).name in done.stdout, f"runs verify says {done.stdout} {done.stderr}")
