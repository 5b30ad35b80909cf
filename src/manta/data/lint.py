"""What looks wrong about prepared data, and whether it stops a run. Found once, judged by the config at every start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from manta.data.shards import EXAMPLES
from manta.data.source import SPLITS
from manta.dataset_config import Level, LintConfig

# What a finding means, and what to do about it. Row numbers and details follow in the message.
MEANING = {
    "no_trained_token": (
        "nothing of them would be trained: the answer is empty, or the prompt fills the sequence",
        "Raise --max_seq_length, or look at the template and the rows",
    ),
    "stop_not_trained": (
        "the answer does not end in a token that ends generation, so the model never learns to stop",
        "Choose another --chat_template, or add its token to eos_token_id in the model's generation_config.json",
    ),
    "boundary_split": (
        "a token would span prompt and answer; both were tokenized apart, as they are served",
        "End the prompt with a newline or a space less",
    ),
    "content_lost": (
        "the chat template left something out",
        "Choose a --chat_template that knows it, or remove it from the rows",
    ),
    "serving_differs": (
        "the prompt in training is not what the tuned model is served",
        "Train on the last turn only, --hfdc_train_on last, set --chat_template_kwargs, or accept it",
    ),
    "trained_share": ("the share of trained tokens is implausible", "Look at the labels: manta inspect"),
    "duplicates": ("equal rows in the training split", "Remove them, or give the dataset a weight"),
    "overlap": (
        "training rows that are in the validation or test split too, which makes evaluation look better than it is",
        "Remove the duplicates from the source",
    ),
    "truncated": ("rows are cut at max_seq_length", "Raise --max_seq_length, or choose --overlong_policy drop"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong: `rows` of them, the `first` few source rows, and a detail of the first."""

    name: str
    level: Level
    rows: int
    first: tuple[int, ...]
    detail: str

    def __str__(self) -> str:
        meaning, remedy = MEANING[self.name]
        where = f" ({self.rows:,} row{'s' * (self.rows != 1)}, the first: {', '.join(map(str, self.first))})"
        detail = f": {self.detail}" if self.detail else ""
        silence = f'--lint \'{{"{self.name}": "off"}}\''
        return f"{self.name}: {meaning}{where if self.rows else ''}{detail}. {remedy}; {silence} to accept it."


def equal_rows(digests: np.ndarray) -> dict[str, dict[str, Any]]:
    """Duplicates in training and training rows that other splits have too, from records of dtype `shards.DIGEST`."""
    training = digests[digests["split"] == SPLITS.index("training")]
    training = training[np.lexsort((training["row"], training["text"]))]
    again = training["row"][1:][training["text"][1:] == training["text"][:-1]]
    held_out = digests["text"][digests["split"] != SPLITS.index("training")]
    shared = training["row"][np.isin(training["text"], held_out)]
    return {
        name: {"rows": len(rows), "first": np.sort(rows)[:EXAMPLES].tolist()}
        for name, rows in (("duplicates", again), ("overlap", shared))
        if len(rows)
    }


def findings(counts: Mapping[str, Any], levels: LintConfig, objective: str) -> list[Finding]:
    """What looks wrong about data with the manifest's `counts`, errors first; nothing that is off."""
    noted: dict[str, Mapping[str, Any]] = {name: about for name, about in counts["noted"].items() if name in MEANING}
    empty = counts["noted"].get("empty_output")
    if empty:
        before = noted.get("no_trained_token", {"rows": 0, "first": []})
        first = sorted([*before["first"], *empty["first"]])[:EXAMPLES]
        noted["no_trained_token"] = {"rows": before["rows"] + empty["rows"], "first": first}
    rows = sum(counts[split]["rows"] for split in ("training", "validation"))
    if "truncated" in noted and noted["truncated"]["rows"] <= levels.truncated_above * rows:
        del noted["truncated"]
    share = counts["training"]["trained_tokens"] / max(1, counts["training"]["tokens"])
    if share < levels.trained_share_below or (share == 1 and objective == "sft"):
        detail = f"{share:.2%} of the training tokens"
        noted["trained_share"] = {"rows": 0, "first": [], "detail": detail}
    found = [
        Finding(name, getattr(levels, name), about["rows"], tuple(about["first"]), about.get("detail", ""))
        for name, about in noted.items()
    ]
    order = list(MEANING)
    return sorted(
        (finding for finding in found if finding.level != "off"),
        key=lambda finding: (finding.level != "error", order.index(finding.name)),
    )
