"""The page of an evaluation: metrics with their intervals, loss curves, and every sample side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from manta import plots
from manta.page import render
from manta.runs import METRIC, Run
from manta.scores import LOWER_IS_BETTER

_COUNTS = ("empty", "cut")


def page(run: Run, report: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The page's HTML. `report` is metrics.json, `lines` are those of predictions.jsonl."""
    models = report["models"]
    metrics = [name for name, value in models["base"].items() if isinstance(value, int | float)]
    logged = plots.history(run, ("loss", METRIC))
    loss = {"training": logged["loss"], "validation": logged[METRIC]}
    return render(
        "evaluation.html",
        run=run,
        report=report,
        lines=lines,
        metrics=metrics,
        best={name: _best(name, models) for name in metrics},
        gained=list(next(iter(report["gains"].values()), {})),
        loss=Markup(plots.curves(loss, "loss (nats per token)", "Loss of training and validation over steps")),
        shown=shown,
        marks=_marks,
        scores=_scores,
    )


def shown(metric: str, value: float | None) -> str:
    """A metric's value for people."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if metric in ("exact_match", "answered"):
        return f"{value:.1%}"
    return f"{value:.1f}" if metric in ("bleu", "chrf") else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _best(metric: str, models: dict[str, Any]) -> list[str]:
    """Who has the best value, if not all have it."""
    values = {name: figures[metric] for name, figures in models.items() if figures[metric] is not None}
    if metric in _COUNTS or len(set(values.values())) < 2:
        return []
    best = (min if metric in LOWER_IS_BETTER else max)(values.values())
    return [name for name, value in values.items() if value == best]


def _marks(line: dict[str, Any]) -> str:
    """What the page's filter asks for."""
    right = {name: bool(each["exact_match"]) for name, each in line["scores"].items()}
    found = []
    for name, is_right in right.items():
        if name != "base":
            found += [f"won {name}"] if is_right and not right["base"] else []
            found += [f"lost {name}"] if right["base"] and not is_right else []
            found += [] if is_right else [f"wrong {name}"]
    if len({line[name] for name in right}) > 1:
        found.append("differ")
    return "|".join(found)


def _scores(line: dict[str, Any], name: str) -> str:
    return ", ".join(f"{metric.replace('_', ' ')} {value:.3g}" for metric, value in line["scores"][name].items())
