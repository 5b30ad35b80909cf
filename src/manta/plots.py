"""Pictures of a run for a page: SVG that takes the page's colours, so that light and dark are one file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from manta import manifest
from manta.runs import Run

# matplotlib draws in these, and the page's variables take their place.
_COLORS = {"#010101": "--text", "#020202": "--line", "#030303": "--series-1", "#040404": "--series-2"}
_INK, _LINE, *_SERIES = _COLORS


def history(run: Run, keys: Sequence[str]) -> dict[str, dict[int, float]]:
    """Logged values by step. A step that was done again counts as it was done last."""
    if not run.metrics_file.exists():
        return {key: {} for key in keys}
    lines = [json.loads(line) for line in manifest.read_text(run.metrics_file).splitlines()]
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in keys}


def curves(series: Mapping[str, Mapping[int, float]], ylabel: str, title: str) -> str:
    """A line for each of at most two series over steps, as an SVG element; empty if there is nothing to draw."""
    from matplotlib.figure import Figure

    drawn = {name: dict(sorted(points.items())) for name, points in series.items() if points}
    if not drawn:
        return ""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes: Any = figure.add_subplot()
    for (name, points), color in zip(drawn.items(), _SERIES, strict=False):
        marker = "o" if len(points) <= 40 else None
        axes.plot(
            list(points), list(points.values()), label=name, color=color, marker=marker, markersize=3, linewidth=1.6
        )
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.tick_params(colors=_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    if len(drawn) > 1:
        axes.legend(frameon=False, labelcolor=_INK)
    return as_svg(figure, title)


def as_svg(figure: Any, title: str) -> str:
    """The figure as an SVG element with a name for screen readers."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "manta", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    for color, variable in _COLORS.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
