"""What happened to runs: `manta runs list`, `show` and `verify`. Reads only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manta import lease, manifest, storage
from manta.config import GENERATED
from manta.errors import ConfigError
from manta.runs import METRIC, Run
from manta.snapshot import DAMAGED


def state(run: Run) -> str:
    """finished, stopped or failed, as the run ended; running while a driver has it; else interrupted."""
    if lease.is_held(run.path):
        return "running"
    result = run.result()
    return result["status"] if result else "interrupted"


def print_runs(results_dir: Path, console: Console) -> None:
    """One line per run in a folder, the newest last. What cannot be read is named, not left out."""
    folders = [path.parent for path in results_dir.glob("*/config.yaml")]
    table = Table(
        box=None,
        padding=(0, 2),
        title=f"{len(folders)} run{'s' * (len(folders) != 1)} in {results_dir}",
        title_justify="left",
    )
    for heading in ("run", "state", "steps", "best", "attempts", "last change"):
        table.add_column(heading)
    for folder in sorted(folders, key=_changed):
        run = Run(folder)
        latest = run.latest()
        value = run.best_value()
        other = "" if run.metric == METRIC else f" {run.metric}"
        figure = f"{value:.4f}{other}" if value is not None else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(_changed(folder)))
        table.add_row(
            run.name, state(run), str(latest.step if latest else 0), figure, str(len(run.world_sizes())), when
        )
    console.print(table)


def print_run(run: Run, console: Console) -> None:
    """Settings, attempts, what was noted, and which checkpoints are complete."""
    try:
        config = run.config()
        what = f"{config.hf_model_id}, {'every weight' if config.full_ft else f'LoRA of rank {config.lora_rank}'}"
        settings = f"{what}, settings {config.fingerprint()}"
    except ConfigError as error:  # of another version of Manta
        settings = str(error)
    console.print(f"{run.path}: {state(run)}\n{settings}", markup=False, soft_wrap=True)
    if holder := lease.holder_of(run.path):
        console.print(f"driver: process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}")
    for event in run.events():
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        if event["kind"] not in ("checkpoint", "validation") and (text := in_words(event)):  # told with checkpoints
            console.print(f"{when}  {text}", markup=False, soft_wrap=True)
    if (result := run.result()) and result["failure"]:
        console.print(f"failed: {result['failure']}", markup=False, soft_wrap=True)
    best, latest, told = run.best(), run.latest(), run.validations()
    for checkpoint in run.checkpoints():
        marks = [name for name, one in (("best", best), ("newest", latest)) if one and one.path == checkpoint.path]
        figures = dict(checkpoint.metrics)
        if found := told.get(checkpoint.path.name):
            figures[run.metric] = found[run.metric]
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        console.print("  ".join(["", checkpoint.path.name, shown, ", ".join(marks)]).rstrip())


def in_words(event: dict[str, Any]) -> str | None:
    """One line of events.jsonl for who reads it afterwards; None for one that says nothing."""
    if event["kind"] == "attempt":
        workers = f"{event['world_size']} worker{'s' * (event['world_size'] != 1)}"
        return f"attempt {event['attempt']}: {workers}, from step {event['step']}"
    if event["kind"] == "failure":
        return f"ended after step {event['step']}: {event['cause'].replace('_', ' ')}: {event['text']}"
    if event["kind"] == "validation":
        told = ", ".join(f"{name} {event[name]:.4g}" for name in sorted(GENERATED & event.keys()))
        return f"answers of step {event['step']}: {told}"
    if event["kind"] == "checkpoint":
        return f"checkpoint of step {event['step']}"
    return event.get("text")


def verify(run: Run, console: Console) -> int:
    """Compare every file of every checkpoint with its hash; returns how many checkpoints are not as they were."""
    damaged = [path.name for path in sorted(run.path.glob(f"{DAMAGED}*"))]
    for path in sorted(path for path in run.path.glob("checkpoint_*") if path.name[-1].isdigit()):
        problem = manifest.damage(path)
        console.print(f"{path.name}: {problem or 'whole'}", markup=False, soft_wrap=True)
        damaged += [path.name] if problem else []
    for name in damaged:
        if name.startswith(DAMAGED):
            console.print(f"{name}: put aside before", markup=False)
    return len(damaged)


def _changed(folder: Path) -> float:
    files = [*folder.glob("*.json*"), folder / "config.yaml"]
    return max(path.stat().st_mtime for path in files + ([] if storage.is_remote(folder) else [folder]))
