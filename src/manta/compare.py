"""Runs beside each other: what they differ in, and what came of it; in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from manta import facts, manifest, plots, record
from manta.config import GENERATED
from manta.errors import UserError
from manta.page import redacted, render
from manta.plots import HALF
from manta.record import Record
from manta.runs import METRIC

MOST = 6  # runs: more curves in a picture cannot be told apart


@dataclass(frozen=True)
class Comparison:
    """What `manta runs compare` shows. Each row of a table has a text per run, in the order of `names`."""

    records: list[Record]
    names: list[str]  # of the runs; with their folder where two have the same name
    settings: dict[str, list[str]]  # that differ, in the config's order
    data: dict[str, list[str]]
    outcome: dict[str, list[str]]
    best: dict[str, list[int]]  # in a row of the outcome, who has the best figure
    same_data: bool  # whether the runs trained on the same prepared data


def compare(names: Sequence[str]) -> Comparison:
    """Compare the runs in these folders. Raises UserError for fewer than two, more than six, or one twice."""
    if not 2 <= len(names) <= MOST:
        raise UserError(f"{len(names)} run{'s' * (len(names) != 1)} cannot be compared. Name two to {MOST}.")
    records = record.open_all(names)
    shared = len({each.name for each in records}) < len(records)
    same_data = len({each.data["path"].name if each.data else None for each in records}) == 1
    return Comparison(
        records,
        [f"{each.run.path.parent.name}/{each.name}" if shared else each.name for each in records],
        _settings(records),
        _data(records),
        _outcome(records),
        _best(records, same_data),
        same_data,
    )


def show(comparison: Comparison, console: Console) -> None:
    """Print what differs, the data, and what came of it."""
    for title, rows in (
        ("settings that differ", comparison.settings),
        ("data", comparison.data),
        ("what came of it", comparison.outcome),
    ):
        table = Table(box=None, padding=(0, 2), title=title, title_justify="left", title_style="bold")
        table.add_column("", no_wrap=True)
        for name in comparison.names:
            table.add_column(name, overflow="fold")
        for label, texts in rows.items():
            best = comparison.best.get(label, [])
            shown = [f"{text} *" if place in best else text for place, text in enumerate(texts)]
            table.add_row(label, *(redacted(text) for text in shown))
        if rows:
            console.print(table)
        else:
            console.print(f"{title}: none")
    if any(comparison.best.values()):
        console.print("* the best")
    if not comparison.same_data:
        console.print("The runs trained on different data, so their losses are of different rows.")


def write_html(comparison: Comparison, path: Path) -> None:
    """The same as one page that needs no network, with curves over each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Markup(picture) for picture in _pictures(comparison) if picture]
    manifest.write_text(path, render("compare.html", without_secrets=True, it=comparison, pictures=pictures))


def _settings(records: list[Record]) -> dict[str, list[str]]:
    names = list(dict.fromkeys(name for each in records for name in each.settings if name != "run_name"))
    rows = {name: [record.as_text(each.settings.get(name, "(unknown)")) for each in records] for name in names}
    return {name: texts for name, texts in rows.items() if len(set(texts)) > 1}


def _data(records: list[Record]) -> dict[str, list[str]]:
    def row(text: Callable[[dict[str, Any]], str]) -> list[str]:
        return [text(each.data) if each.data else "not there" for each in records]

    def split(key: str, name: str) -> list[str]:
        return row(lambda data: f"{data['splits'][name][key]:,}" if key in data["splits"][name] else "")

    def share(data: dict[str, Any]) -> str:
        training = data["splits"]["training"]
        return f"{training['trained_tokens'] / training['tokens']:.1%}" if training.get("tokens") else ""

    return {
        "fingerprint": row(lambda data: data["path"].name),
        "training samples": split("samples", "training"),
        "training tokens": split("tokens", "training"),
        "trained share": row(share),
        "validation samples": split("samples", "validation"),
    }


def _outcome(records: list[Record]) -> dict[str, list[str]]:
    found = [facts.figures(each) for each in records]
    names = list(dict.fromkeys(name for each in found for name in each))
    return {name: [each.get(name, "") for each in found] for name in names}


def _best(records: list[Record], same_data: bool) -> dict[str, list[int]]:
    """Who has the best figure of those that all have; nobody where it is the same for all, or figures of other data or
    other metrics."""
    rows: dict[str, tuple[list[float | None], bool]] = {
        "tokens/s": ([each.tokens_per_second for each in records], True),
        "peak memory of a worker": ([each.peak_memory_bytes for each in records], False),
    }
    if same_data and len(metrics := {each.metric for each in records}) == 1:
        metric = metrics.pop()
        rows[f"best {metric}"] = ([each.best_value for each in records], metric != METRIC)
    found = {}
    for name, (values, larger) in rows.items():
        known = [value for value in values if value is not None]
        if len(known) == len(values) and len(set(known)) > 1:
            top = (max if larger else min)(known)
            found[name] = [place for place, value in enumerate(values) if value == top]
    return found


def _pictures(comparison: Comparison) -> list[str]:
    asked = [("loss", "training loss"), (METRIC, "validation loss")]
    asked += [("learning_rate", "learning rate"), ("grad_norm", "norm of gradients")]
    named = list(zip(comparison.names, comparison.records, strict=True))
    drawn: list[tuple[str, dict[str, Any]]]
    drawn = [(label, {name: each.series(key) for name, each in named}) for key, label in asked]
    drawn.append(("tokens per second", {name: each.speed() for name, each in named}))
    for metric in sorted(GENERATED):
        told = {n: {one["step"]: one[metric] for one in each.answers.values() if metric in one} for n, each in named}
        drawn.append((metric, told))
    return [plots.curves(series, label, f"{label} of the runs over steps", HALF) for label, series in drawn]
