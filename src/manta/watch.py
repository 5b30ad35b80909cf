"""A run seen from elsewhere: the display of `manta train`, from the run's files alone."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from manta import lease, manifest, storage
from manta.errors import TrainingError, UserError
from manta.jsonl import NewLines
from manta.outcome import FAILED, FINISHED, exit_code, why_failed
from manta.progress import LOOK_S, Display
from manta.report import print_summary
from manta.runs import Run
from manta.status import Status

DETACHED = 130  # as a shell has it for Ctrl-C


def find(name: str, wait: bool = False) -> Run:
    """The run in the folder `name`; if we `wait`, once a driver has it, or at once if it has finished.

    Raises UserError if there is none.
    """
    run = Run(storage.place(name))
    while not (run.config_file.is_file() and (not wait or lease.is_held(run.path) or _has_finished(run))):
        if not wait:
            others = sorted(file.parent.name for file in run.path.parent.glob("*/config.yaml"))
            there = f" Runs in {run.path.parent}: {', '.join(others)}." if others else ""
            raise UserError(
                f"There is no run at {run.path}, or not yet: its folder is made once its data is prepared.{there} Mend "
                "the name, or wait for it with --wait."
            )
        time.sleep(LOOK_S[storage.is_remote(run.path)])
    return run


def watch(run: Run, console: Console, out: Console) -> int:
    """Show a run until it ends, and its summary on `out`; returns its driver's exit code, or DETACHED after Ctrl-C.

    Raises TrainingError for a run that failed, and for one whose driver is gone without having ended it.
    """
    try:
        if lease.is_held(run.path):
            with Display(run.name, Status(run.name, "starting"), console) as display:
                _follow(run, display)
    except KeyboardInterrupt:
        console.print(f"{run.name} goes on; this was only a look at it.", markup=False)
        return DETACHED
    result = run.result()
    if result is None:
        raise TrainingError(_interrupted(run))
    if result["status"] == FAILED:
        raise TrainingError(why_failed(run, result))
    print_summary(result, out)
    return exit_code(result)


def _follow(run: Run, display: Display) -> None:
    """Until nobody has the run. What happened since its driver began is told first."""
    events, problem = NewLines(run.events_file), None
    held = True
    while held:
        try:
            held = lease.is_held(run.path)  # before the rest is read, so that nothing of the end is missed
            before, display.status = display.status, _status(run)
            for event in events.read():
                if event["time"] >= display.status.began:
                    display.tell(event)
        except Exception as error:  # of any client of a store: the next look may succeed
            if not storage.is_remote(run.path) and not isinstance(error, OSError):
                raise
            if problem is None:
                display.note(f"{run.path} cannot be read just now: {error}")
            problem = error
        else:
            problem = None
            if display.status.time != before.time or not held:
                display.show(now=display.status.eval_loss != before.eval_loss or not held)
        if held:
            time.sleep(LOOK_S[storage.is_remote(run.path)])


def _has_finished(run: Run) -> bool:
    return (run.result() or {}).get("status") == FINISHED


def _status(run: Run) -> Status:
    found = manifest.read_json(run.progress_file)
    return Status.load(found) if found else Status(run.name, "starting")


def _interrupted(run: Run) -> str:
    latest = run.latest()
    where = f"the checkpoint of step {latest.step}" if latest else "the start, since there is no checkpoint"
    return (
        f"{run.name} is not running, and has not ended by itself: its driver is gone.\n"
        f"It goes on from {where}: manta train --resume {_short(run.path)}"
    )


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
