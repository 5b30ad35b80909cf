"""What no run needs any more, and its deletion: `manta runs gc`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from manta import ledger, manifest, storage
from manta.errors import UserError
from manta.lease import Lease, refuse_if_held
from manta.progress import say
from manta.runs import Run
from manta.snapshot import DAMAGED


def collect(where: str, dry_run: bool, console: Console) -> int:
    """Delete what is left over in a run, or in all runs of a folder; says and returns the bytes freed.

    A run that a driver has is left alone, and held by us while it is cleaned. Raises UserError without any run.
    """
    place = storage.place(where)
    is_run = (place / "config.yaml").is_file()
    found = [Run(place)] if is_run else [Run(file.parent) for file in place.glob("*/config.yaml")]
    if not found:
        raise UserError(f"There is no run at {where}. Give a run's folder, or a folder of runs.")
    freed = 0
    for run in sorted(found, key=lambda run: run.name):
        try:
            refuse_if_held(run.path)
            with nullcontext() if dry_run else Lease(run):
                freed += sum(_delete(path, why, dry_run, console) for path, why in _leftovers(run))
        except UserError as error:  # somebody trains it
            say(console, f"left alone: {error}")
    for path in storage.near(place).glob("*") if storage.is_remote(place) and not is_run else ():
        if any(path.glob("checkpoint_*")) and not (place / path.name).exists():  # a run, not data under way
            freed += _delete(path, "a copy on this machine of what is gone", dry_run, console)
    say(console, f"{freed / 1e6:,.1f} MB {'would be freed' if dry_run else 'freed'}")
    return freed


def _leftovers(run: Run) -> Iterator[tuple[Path, str]]:
    """(file or folder, why nobody needs it)."""
    for path in sorted(run.path.glob("checkpoint_*")):
        if path.is_dir() and manifest.read(path) is None:
            yield path, "unfinished"
    for path in sorted(run.path.glob(f"{DAMAGED}*")):
        yield path, "damaged, and put aside"
    checkpoints = run.checkpoints()
    needed = {name for checkpoint in checkpoints for name in ledger.chain(run.ledger, checkpoint.step)}
    for path in sorted(run.ledger.glob("*.jsonl")):
        if checkpoints and path.name not in needed:
            yield path, "steps of an attempt that no checkpoint came from"
    for path in sorted(path for path in run.path.glob(".*") if path.name.endswith(".tmp")):
        yield path, "half written"
    if storage.is_remote(run.path):
        best, latest = run.best(), run.latest()
        names = {checkpoint.path.name for checkpoint in (best, latest) if checkpoint}
        for path in sorted(run.here.glob("*checkpoint_*")):
            if path.is_dir() and path.name not in names:
                yield path, "a copy on this machine"


def _delete(path: Path, why: str, dry_run: bool, console: Console) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    say(console, f"{path}: {why}, {size:,} bytes")
    if not dry_run and path.is_dir():
        storage.remove(path)
    elif not dry_run:
        path.unlink(missing_ok=True)
    return size
