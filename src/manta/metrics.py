"""Answers against references: exact match, ROUGE, BLEU and chrF, and how sure such figures are. Knows no model."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from manta.errors import UserError

GSM8K = r"####\s*([^\n]+)"  # https://github.com/openai/grade-school-math: the final answer's line
RESAMPLES = 1000
_INDICES = 1_000_000  # drawn at once
# Scripts without spaces between words count by character; rouge-score's own tokens are ASCII only.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|\w+")
_PLAIN_WORD = re.compile(r"\b(a|an|the)\b")


def _as_words(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): case, punctuation and articles do not count."""
    kept = "".join(letter for letter in text.casefold() if letter not in string.punctuation)
    return " ".join(_PLAIN_WORD.sub(" ", kept).split())


def _as_number(text: str) -> str:
    """The number's value, whatever its separators, signs of money and trailing zeros; any other text as it is."""
    bare = text.strip().strip("$€£%").rstrip(".").replace(",", "").strip()
    try:
        value = Decimal(bare)
    except InvalidOperation:
        return text.strip()
    return format(value.normalize(), "f") if value.is_finite() else text.strip()


NORMALIZE: dict[str, Callable[[str], str]] = {"strip": str.strip, "words": _as_words, "number": _as_number}


@dataclass(frozen=True)
class AnswerRule:
    """What of an output is its answer, and which differences between answers do not count.

    `pattern` is a regular expression whose first group, where it first matches, is the answer; None: the whole output.
    """

    pattern: str | None = None
    normalize: str = "strip"

    def answer(self, text: str) -> str | None:
        """The normalised answer, or None if the output gives none."""
        if self.pattern is None:
            return NORMALIZE[self.normalize](text)
        found = re.search(self.pattern, text)
        return NORMALIZE[self.normalize](found[1]) if found else None

    def describe(self) -> str:
        what = "the whole output" if self.pattern is None else f"what {self.pattern} finds"
        return f"{what}, compared as {self.normalize}"


def rule(pattern: str, normalize: str, references: Sequence[str]) -> AnswerRule:
    """The rule as asked. `auto` is GSM8K's where every reference has such a line, else the whole output without the
    white space around it. Raises UserError if the pattern is none, or some reference has no answer by it."""
    is_gsm8k = pattern == "gsm8k" or (pattern == "auto" and all(re.search(GSM8K, each) for each in references))
    expression = GSM8K if is_gsm8k else None if pattern in ("auto", "all") else pattern
    if expression is not None:
        try:
            groups = re.compile(expression).groups
        except re.error as error:
            raise UserError(f"--answer_pattern {pattern} is no regular expression: {error}.") from error
        if not groups:
            raise UserError(f"--answer_pattern {pattern} has no group. Put ( ) around the answer.")
    chosen = ("number" if is_gsm8k else "strip") if normalize == "auto" else normalize
    found = AnswerRule(expression, chosen)
    if without := [i for i, each in enumerate(references) if found.answer(each) is None]:
        raise UserError(
            f"--answer_pattern {pattern} finds nothing in {len(without)} of {len(references)} references, first in "
            f"row {without[0] + 1} of the test data. Mend the pattern, or leave it out to compare whole outputs."
        )
    return found


class _Tokens:
    """A tokenizer for rouge-score that keeps every script."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


def rows(answers: Sequence[str], references: Sequence[str], compare: AnswerRule) -> dict[str, np.ndarray]:
    """Figures of each row, [rows] in 0…1: exact_match, answered, and F1 of rouge1, rouge2 and rougeL (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Tokens())
    given = [compare.answer(each) for each in answers]
    wanted = [compare.answer(each) for each in references]
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {
        "exact_match": np.array([a is not None and a == b for a, b in zip(given, wanted, strict=True)], dtype=float),
        "answered": np.array([bool(each) for each in given], dtype=float),
        **{name: np.array([each[name].fmeasure for each in rouge]) for name in ("rouge1", "rouge2", "rougeL")},
    }


def corpus(answers: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, Any]]:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) of all rows together, 0…100, by sacrebleu, with its signature
    and a 95 % interval from resampled rows (None for fewer than two rows)."""
    from sacrebleu.metrics import BLEU, CHRF

    found = {}
    for name, metric in (("bleu", BLEU(effective_order=True)), ("chrf", CHRF())):  # or no answer of a word has a BLEU
        score = metric.corpus_score(list(answers), [list(references)])
        # What a score is made of, row by row: sacrebleu's own resampling stops where a resample scores nothing.
        parts = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]), dtype=float)
        resampled = None
        if (count := len(answers)) > 1:
            weights = np.random.default_rng(0).multinomial(count, [1 / count] * count, RESAMPLES)
            drawn = [float(metric._compute_score_from_stats(total.tolist()).score) for total in weights @ parts]
            resampled = np.percentile(drawn, (2.5, 97.5)).tolist()
        found[name] = {"value": float(score.score), "interval": resampled, "signature": str(metric.get_signature())}
    return found


def interval(values: np.ndarray, weights: np.ndarray | None = None, seed: int = 0) -> list[float] | None:
    """95 % percentile bootstrap interval (Efron 1979) of the mean over rows, or of the mean weighted by [rows] weights,
    such as tokens; None for fewer than two rows."""
    count = len(values)
    if count < 2:
        return None
    weighed = np.ones(count) if weights is None else weights
    draw = np.random.default_rng(seed)
    at_once = max(1, _INDICES // count)
    means = []
    for first in range(0, RESAMPLES, at_once):
        chosen = draw.integers(0, count, (min(at_once, RESAMPLES - first), count))
        total = weighed[chosen].sum(1)
        sums = (values[chosen] * weighed[chosen]).sum(1)
        means.append(np.divide(sums, total, out=np.full(len(total), np.nan), where=total > 0))
    low, high = np.nanpercentile(np.concatenate(means), (2.5, 97.5)).tolist()
    return [low, high]
