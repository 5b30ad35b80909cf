"""What a finished run says to a person: a short table, and the next commands to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(result: dict[str, Any], console: Console | None = None) -> None:
    """Print result.json as a table, with the next commands."""
    console = console or Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in _rows(result):
        table.add_row(name, value)
    console.print(table)
    run = _short(result["run"])
    if result["status"] == "stopped":
        console.print(f"\nGo on:     manta train --config {run}/config.yaml", markup=False, soft_wrap=True)
        return
    console.print(f"\nConvert:   manta convert --run {run}", markup=False, soft_wrap=True)
    console.print(f"Evaluate:  manta evaluate --run {run}", markup=False, soft_wrap=True)


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    steps = f"{result['steps']} of {result['max_steps']}"
    if result["stopped_early"]:
        steps += " (stopped early: the evaluation loss no longer fell)"
    rows = [("status", result["status"]), ("run", _short(result["run"])), ("steps", steps)]
    if result["best_metric"] is not None:
        rows.append(("best " + result["metric"], f"{result['best_metric']:.4f}"))
    if result["best_checkpoint"]:
        rows.append(("best checkpoint", Path(result["best_checkpoint"]).name))
    rows.append(("workers", " → ".join(str(size) for size in result["world_sizes"])))
    if result["tokens_per_second"]:
        rows.append(("tokens/s", f"{result['tokens_per_second']:,.0f}"))
    rows.append(("wall time", f"{result['seconds']['total']:.1f} s"))
    return rows


def _short(path: str) -> str:
    """Relative to where the user stands, if that is shorter."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
