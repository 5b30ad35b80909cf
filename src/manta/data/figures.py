"""Figures of a split of prepared data, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from manta.data import lint
from manta.data.prepare import Prepared
from manta.data.shards import TOKENIZED

_BINS = 24


def of_split(prepared: Prepared, split: str) -> dict[str, Any]:
    """Counts as in the manifest; of a tokenized split with samples also `share`, the trained tokens' share, and of its
    samples' tokens `lengths` (min, median, p95, max) and `histogram` (counts, from, to), which read the folder here.
    """
    figures = dict(prepared.counts[split])
    if split not in TOKENIZED or not figures["samples"]:
        return figures
    lengths, _ = prepared.lengths(split)
    low, middle, high, longest = np.percentile(lengths, (0, 50, 95, 100)).astype(int).tolist()
    figures["share"] = figures["trained_tokens"] / figures["tokens"]
    figures["lengths"] = {"min": low, "median": middle, "p95": high, "max": longest}
    heights, edges = np.histogram(lengths, bins=min(_BINS, max(1, longest - low + 1)))
    figures["histogram"] = {"counts": heights.tolist(), "from": int(edges[0]), "to": int(edges[-1])}
    return figures


def left_out(counts: Mapping[str, Any]) -> dict[str, int]:
    """Reason → rows that no sample was made of, of the manifest's `counts`."""
    noted = {reason: each["rows"] for reason, each in counts["noted"].items() if reason not in lint.MEANING}
    dropped = {name: counts["noted"][name]["rows"] for name in ("no_trained_token",) if name in counts["noted"]}
    return noted | dropped | ({"bad row": counts["quarantined"]} if counts["quarantined"] else {})
