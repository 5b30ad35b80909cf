"""A disk that is full for a while: a small file system in memory with the run's folder on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from faults.bench import Bench, Row
from faults.job import Job
from faults.workers import end
from manta import manifest

DISK = "disk full during upload / during Ray's snapshot"


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "24m") -> Iterator[Path]:
    """A file system of its own at `folder`. Raises CalledProcessError without the right to mount."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """No free page in the file system of `folder` inside the block: what others free is taken at once."""
    stop = threading.Event()
    path = folder / "filler"

    def fill() -> None:
        with path.open("wb") as file:
            size = 0
            while not stop.is_set():
                free = os.statvfs(folder)
                if more := free.f_bavail * free.f_frsize:
                    with contextlib.suppress(OSError):
                        os.posix_fallocate(file.fileno(), size, more)
                        size += more
                time.sleep(0.0005)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink()


def disk(bench: Bench) -> None:
    rows: list[Row] = []
    with (
        small_disk(bench.folder / "disk") as folder,
        bench.job("disk", results_dir=str(folder), step_copies="off") as job,
    ):
        with bench.row(DISK, "full from before a save until after it") as row:
            rows.append(row)
            job.ensure_running()
            job.until(lambda: job.run.checkpoints(), 60)
            job.steps_more(2)
            with filled(folder):
                _full_for(job, row, 6)
            _go_on(job, row)
        with bench.row(DISK, "full from the moment a manifest is written, when Ray writes its snapshot") as row:
            rows.append(row)
            job.ensure_running()
            known = len(job.run.checkpoints())
            names = {path.name for path in folder.glob("disk/checkpoint_*")}
            job.until(lambda: known and _closed(job) - names, 60, pause=0.001)
            with filled(folder):
                _full_for(job, row, 3)
            _go_on(job, row)
        end(bench, job, rows)


def _closed(job: Job) -> set[str]:
    return {path.parent.name for path in job.run.path.glob(f"checkpoint_*/{manifest.NAME}")}


def _full_for(job: Job, row: Row, seconds: float) -> None:
    """Let the run meet the full disk: what was whole before must still be, and a command that ended has said why."""
    before = [found.path for found in job.run.checkpoints()]
    time.sleep(seconds)
    assert job.driver
    if job.driver.poll() is not None:
        row.notes.append(f"the command ended with {job.driver.returncode}: {job.said(300)}")
        row.must("No space left" in job.said() or "disk" in job.said().lower(), f"it does not say why: {job.said(300)}")
    damaged = [path.name for path in before if path.exists() and manifest.damage(path)]
    row.must(not damaged, f"{damaged} were whole and are damaged")
    row.must(any(path.exists() for path in before), "no older checkpoint is left")


def _go_on(job: Job, row: Row) -> None:
    """With room again: the run goes on by itself, or the same command goes on."""
    now, before = time.time(), len(job.events("attempt"))
    job.ensure_running()
    new = job.until(lambda: next((line for line in job.losses() if line["time"] > now), None), 90)
    row.seconds_to_new_step = new["time"] - now
    later = job.events("attempt")[before:]
    row.wasted_steps = 0
    if later:
        done = max(line["step"] for line in job.losses() if line["attempt"] < later[0]["attempt"])
        row.wasted_steps = max(0, done - later[0]["step"])
