"""Figures of one model's answers: of each row, and of all with how sure they are.

`loss` is the mean over the references' trained tokens and EOS, in nats, `perplexity` its exponential. Exact match,
ROUGE and BERTScore are means over rows in 0…1; BLEU and chrF are of all rows together, in 0…100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manta import metrics
from manta.bertscore import Scorer
from manta.generation import Answer

LOWER_IS_BETTER = frozenset(("loss", "perplexity"))


@dataclass(frozen=True)
class Scoring:
    """How answers are compared: see `metrics.rule` and `bertscore.find_encoder`."""

    answer_pattern: str = "auto"
    normalize: str = "auto"
    bertscore_model: str = "auto"  # off: leave it out
    bertscore_layer: int | None = None


def of_rows(
    texts: Sequence[str],
    references: Sequence[str],
    rule: metrics.AnswerRule,
    scorer: Scorer | None = None,
) -> dict[str, np.ndarray]:
    """Each metric's values, [rows]."""
    values = metrics.rows(texts, references, rule)
    if scorer:
        for name, each in scorer.score(texts, references).items():
            values[f"bertscore_{name}"] = each
    return values


def of_model(
    values: Mapping[str, np.ndarray], given: Sequence[Answer], texts: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
    """Each metric over all rows, and under `intervals` its 95 % interval; how many answers are empty or were cut."""
    losses, scored = np.array([each.loss for each in given]), np.array([each.scored for each in given])
    figures: dict[str, Any] = {"loss": None, "perplexity": None}
    intervals: dict[str, Any] = {"loss": None, "perplexity": None}
    if total := int(scored.sum()):
        per_token = np.divide(losses, scored, out=np.zeros(len(given)), where=scored > 0)
        figures["loss"], intervals["loss"] = float(losses.sum()) / total, metrics.interval(per_token, scored)
        figures["perplexity"] = _exp(figures["loss"])
        intervals["perplexity"] = [_exp(end) for end in intervals["loss"] or ()] or None
    for name, each in values.items():
        figures[name], intervals[name] = float(each.mean()), metrics.interval(each)
    for name, whole in metrics.corpus(texts, references).items():
        figures[name], intervals[name] = whole["value"], whole["interval"]
        figures[f"{name}_signature"] = whole["signature"]
    figures["empty"] = sum(not text.strip() for text in texts)
    figures["cut"] = sum(each.cut for each in given)
    return figures | {"intervals": intervals}


def gains(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """What each model has over the base, row by row, with its 95 % interval: one without 0 inside is no accident."""
    base = values["base"]
    return {
        name: {
            metric: {
                "mean": float((each[metric] - base[metric]).mean()),
                "interval": metrics.interval(each[metric] - base[metric]),
            }
            for metric in each
        }
        for name, each in values.items()
        if name != "base"
    }


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700))  # the largest that a float holds
