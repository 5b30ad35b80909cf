"""What the stages return to a Python program: result.json and metrics.json, with types."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from manta import storage

# Shown in the terminal and in notebooks, in this order; the page and metrics.json have all.
SHOWN = ("loss", "exact_match", "rougeL", "bleu", "chrf", "bertscore_f1")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: the run's `result.json`.

    Paths are local ones, or of an object store (`UPath`), as the run's.
    """

    status: Literal["finished", "stopped"]
    """finished: all steps, or stopped early; stopped: by `stop_at_step` or SIGTERM, and `train` again goes on."""
    run: Path
    """The run's folder: `config.yaml`, checkpoints, `metrics.jsonl`, `events.jsonl`, logs."""
    steps: int
    """Optimizer steps done."""
    max_steps: int
    """Optimizer steps that the run was to have."""
    stopped_early: bool
    """Whether `early_stopping_patience` ended it."""
    metric: str
    """What the best checkpoint is best in (`metric_for_best`)."""
    best_metric: float | None
    """Its figure: for `eval_loss` nats per token; None without evaluation."""
    best_checkpoint: Path | None
    latest_checkpoint: Path | None
    train_loss: float | None
    """Of the last step that was logged, nats per trained token."""
    epoch: float | None
    """Passes over the data."""
    attempts: int
    """How often workers were started, one time without a failure."""
    world_sizes: tuple[int, ...]
    """Workers of each attempt."""
    skipped_steps: int
    """Steps left out by `non_finite: skip`."""
    tokens: int
    """Tokens trained on since the driver's start, padding not counted."""
    tokens_per_second: float | None
    """Over all workers, from the first step's end to the last one's."""
    seconds: Mapping[str, float] = field(repr=False)
    """Wall seconds of each phase: check, ray, prepare, fit, until_first_step and its parts, total."""
    raw: Mapping[str, Any] = field(repr=False, compare=False)
    """All that `result.json` holds."""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> TrainResult:
        """From the content of `result.json`."""
        names = ("status", "steps", "max_steps", "stopped_early", "metric", "best_metric", "train_loss", "epoch")
        counts = ("attempts", "skipped_steps", "tokens", "tokens_per_second", "seconds")
        return cls(
            run=storage.place(raw["run"]),
            best_checkpoint=_place(raw["best_checkpoint"]),
            latest_checkpoint=_place(raw["latest_checkpoint"]),
            world_sizes=tuple(raw["world_sizes"]),
            raw=raw,
            **{name: raw[name] for name in (*names, *counts)},
        )


@dataclass(frozen=True)
class Scores:
    """One model's figures over all rows: `scores["exact_match"]`, and its 95 % interval, `scores.intervals[…]`.

    `loss` is nats per token, EOS included, `perplexity` its exponential; exact_match, answered, ROUGE and BERTScore are
    in 0…1, BLEU and chrF in 0…100.
    """

    checkpoint: str
    """The folder, or the hub's name, of the weights."""
    values: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float] | None] = field(repr=False)

    def __getitem__(self, metric: str) -> float | None:
        return self.values[metric]


@dataclass(frozen=True)
class Gain:
    """What a model has over the base in one metric, row by row; an `interval` (95 %) without 0 is no accident."""

    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Evaluation:
    """Base and checkpoints on held-out rows: the run's `evaluation/metrics.json`. A notebook shows it as a table."""

    run: Path
    rows: int
    """How many rows were answered by each model."""
    models: Mapping[str, Scores]
    """`base`, `tuned` (the best checkpoint), and others by their checkpoint's name."""
    gains: Mapping[str, Mapping[str, Gain]] = field(repr=False)
    """For each model but the base: metric → gain."""
    raw: Mapping[str, Any] = field(repr=False, compare=False)
    """All that `metrics.json` holds."""

    @property
    def page(self) -> Path:
        """`report.html`, with every sample side by side."""
        return self.run / "evaluation" / "report.html"

    @property
    def predictions(self) -> Path:
        """`predictions.jsonl`: each row with every model's answer and scores."""
        return self.run / "evaluation" / "predictions.jsonl"

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Evaluation:
        """From the content of `metrics.json`."""
        return cls(
            run=storage.place(raw["run"]),
            rows=raw["rows"],
            models={name: _scores(figures) for name, figures in raw["models"].items()},
            gains={
                name: {metric: Gain(each["mean"], _pair(each["interval"])) for metric, each in metrics.items()}
                for name, metrics in raw["gains"].items()
            },
            raw=raw,
        )

    def _repr_html_(self) -> str:
        metrics = [name for name in SHOWN if name in next(iter(self.models.values())).values]
        head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("model", *metrics))
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td>"
            + "".join(f"<td>{_shown(each[metric])}</td>" for metric in metrics)
            + "</tr>"
            for name, each in self.models.items()
        )
        return f"<table><tr>{head}</tr>{rows}</table>"


def _scores(figures: Mapping[str, Any]) -> Scores:
    numbers = {name: value for name, value in figures.items() if value is None or isinstance(value, int | float)}
    intervals = {name: _pair(value) for name, value in figures["intervals"].items()}
    return Scores(figures["checkpoint"], numbers, intervals)


def _pair(interval: Any) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None


def _place(path: str | None) -> Path | None:
    return storage.place(path) if path else None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
