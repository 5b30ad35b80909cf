"""Pictures of runs for a page: SVG that takes the page's colours, so that light and dark are one file."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from manta import manifest
from manta.runs import Run

# matplotlib draws in these, and the page's variables take their place.
_COLORS = {"#010101": "--text", "#020202": "--line", "#030303": "--error"}
_COLORS |= {f"#0{number}0{number}0{number}": f"--series-{number - 3}" for number in range(4, 10)}
_INK, _LINE, _ALARM, *_SERIES = _COLORS
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), "-.", (0, (8, 2)), (0, (3, 1, 1, 1)))  # so that colour is not all
MOST_POINTS = 1000  # of a curve: more than a screen has columns, and a page of a long run stays small
MOST_MARKS = 100
X = TypeVar("X", bound=float)
WIDE, HALF = (11.0, 2.6), (6.4, 3.0)  # inches


@dataclass(frozen=True)
class Mark:
    """Where something happened along the x axis; `alarm`: something that went wrong."""

    x: float
    alarm: bool


def history(run: Run, keys: Sequence[str]) -> dict[str, dict[int, float]]:
    """Logged values by step. A step that was done again counts as it was done last."""
    lines = manifest.read_json_lines(run.metrics_file)
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in keys}


def thinned(points: Mapping[X, float], most: int = MOST_POINTS) -> dict[X, float]:
    """`points` in order of x; of more than `most`, the lowest and the highest of each stretch, so that spikes stay."""
    steps = sorted(points)
    if len(steps) <= most:
        return {step: points[step] for step in steps}
    kept = {steps[0], steps[-1]}
    for part in range(most // 2 - 1):
        stretch = steps[part * len(steps) // (most // 2 - 1) : (part + 1) * len(steps) // (most // 2 - 1)]
        kept |= {min(stretch, key=points.__getitem__), max(stretch, key=points.__getitem__)}
    return {step: points[step] for step in sorted(kept)}


def curves(
    series: Mapping[str, Mapping[int, float]],
    ylabel: str,
    title: str,
    size: tuple[float, float] = (8, 3.2),
    marks: Iterable[Mark] = (),
) -> str:
    """A line for each of at most six series over steps, as an SVG element; empty if there is nothing to draw.

    Values that are not finite are crosses at the bottom.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return ""
    figure, axes = _axes(size, "step", ylabel)
    broken: set[int] = set()
    for number, (name, points) in enumerate(drawn.items()):
        finite = thinned({step: value for step, value in points.items() if math.isfinite(value)})
        broken |= points.keys() - {step for step, value in points.items() if math.isfinite(value)}
        _line(axes, list(finite), list(finite.values()), name, number)
    _draw_marks(axes, marks)
    if broken:
        at = list(thinned(dict.fromkeys(broken, 0.0), MOST_MARKS))
        cross = {"marker": "x", "color": _ALARM, "linestyle": "none", "clip_on": False}
        axes.plot(at, [0.0] * len(at), label="not finite", transform=axes.get_xaxis_transform(), **cross)
    return _finished(figure, axes, title, len(drawn) > 1 or bool(broken))


def timeline(
    attempts: Sequence[Mapping[float, int]],
    checkpoints: Mapping[float, int],
    failures: Mapping[float, int],
    resumed: Sequence[float],
    title: str,
) -> str:
    """Steps over running time in seconds, each attempt a line, with what was saved and what ended attempts."""
    longest = max((time for points in attempts for time in points), default=0.0)
    unit, seconds = next((pair for pair in (("hours", 3600), ("minutes", 60)) if longest > 3 * pair[1]), ("seconds", 1))
    if not any(attempts):
        return ""
    figure, axes = _axes(WIDE, f"{unit} of running", "step")
    for points in attempts[:MOST_MARKS]:
        few = thinned(dict(enumerate(points.values())), 300)
        times = list(points)
        axes.plot([times[index] / seconds for index in few], list(few.values()), color=_SERIES[0], linewidth=1.6)
    _draw_marks(axes, [Mark(time / seconds, True) for time in failures])
    _draw_marks(axes, [Mark(time / seconds, False) for time in resumed])
    for points, look in (
        (checkpoints, {"label": "checkpoint", "marker": "o", "markersize": 4, "color": _SERIES[1]}),
        (failures, {"label": "workers ended", "marker": "X", "markersize": 8, "color": _ALARM}),
    ):
        if points:
            shown = thinned(points, MOST_MARKS)
            axes.plot([time / seconds for time in shown], list(shown.values()), linestyle="none", **look)
    return _finished(figure, axes, title, bool(checkpoints or failures))


def _axes(size: tuple[float, float], xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.add_subplot()
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.tick_params(colors=_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    return figure, axes


def _line(axes: Any, x: Sequence[float], y: Sequence[float], name: str, number: int) -> None:
    color, dash = _SERIES[number % len(_SERIES)], _DASHES[number % len(_DASHES)]
    marker = "o" if len(x) <= 40 else None
    axes.plot(x, y, label=name, color=color, linestyle=dash, marker=marker, markersize=3, linewidth=1.6)


def _draw_marks(axes: Any, marks: Iterable[Mark]) -> None:
    for mark in list(marks)[:MOST_MARKS]:
        color = _ALARM if mark.alarm else _INK
        axes.axvline(mark.x, color=color, linestyle="--" if mark.alarm else ":", linewidth=1, zorder=1)


def _finished(figure: Any, axes: Any, title: str, legend: bool) -> str:
    if legend:
        axes.legend(frameon=False, labelcolor=_INK)
    return as_svg(figure, title)


def as_svg(figure: Any, title: str) -> str:
    """The figure as an SVG element with a name for screen readers."""
    import matplotlib

    text = io.StringIO()
    # The title in the salt: equal names in two pictures of a page would mean each other's parts.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    for color, variable in _COLORS.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z.]+(2d)?_\d+"', "", svg)  # matplotlib's counting, which begins anew in each picture
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
