"""The sum of what the shards of a preparation report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from manta.config import Config
from manta.data.shards import EXAMPLES, TOKENIZED
from manta.data.source import SPLITS
from manta.errors import UserError


class Total:
    """The sum of the shards' summaries; the same whatever order they come in."""

    def __init__(self) -> None:
        self.rows = self.bad = 0
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[int]] = {}
        self.details: dict[str, tuple[int, str]] = {}
        self.first_bad: list[dict[str, Any]] = []

    def add(self, summary: dict[str, Any]) -> None:
        self.rows += summary["rows"]
        self.bad += summary["bad"]
        self.counts.update(summary["counts"])
        self.first_bad = sorted([*self.first_bad, *summary["first_bad"]], key=lambda bad: bad["row"])[:EXAMPLES]
        for what, rows in summary["first"].items():
            self.first[what] = sorted([*self.first.get(what, []), *rows])[:EXAMPLES]
            if what in summary["details"]:
                detail = (rows[0], summary["details"][what])
                self.details[what] = min(self.details.get(what, detail), detail)

    def counts_of_splits(self, config: Config) -> dict[str, Any]:
        """Figures of each split and what was noted. Raises UserError if nothing is left of a split that is needed."""
        noted = {
            what: {
                "rows": self.counts[what],
                "first": rows,
                **({"detail": self.details[what][1]} if what in self.details else {}),
            }
            for what, rows in self.first.items()
        }
        for split in TOKENIZED if config.evaluates else TOKENIZED[:1]:
            if not self.counts[f"{split}_samples"]:
                reasons = [f"{reason}: {about['rows']}" for reason, about in noted.items()]
                reasons += [f"row {bad['row']}: {bad['reason']}" for bad in self.first_bad[:3]]
                raise UserError(
                    f"No {split} sample can be trained on ({', '.join(reasons) or 'no row was left'}). Raise "
                    f"--max_seq_length (now {config.max_seq_length}) or check the templates."
                )
        figures = {
            split: {
                what: self.counts[f"{split}_{what}"]
                for what in ("rows", "samples", "tokens", "trained_tokens")
                if what == "rows" or split in TOKENIZED
            }
            for split in SPLITS
        }
        return {**figures, "noted": noted, "serving_checked": self.counts["serving_checked"]}
