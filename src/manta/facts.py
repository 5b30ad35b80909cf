"""What there is to say of a run in words and figures, for its page and for a comparison."""

from __future__ import annotations

import shlex
import time

from manta.lease import holder_of
from manta.phases import PARTS
from manta.record import Record


def headline(it: Record) -> str:
    """How the run is, in a sentence."""
    steps = it.result.get("max_steps") or it.settings.get("max_steps")
    text = f"{it.state} after step {it.steps:,} of {steps:,}" if isinstance(steps, int) else it.state
    if it.result.get("stopped_early") and it.state == "finished":
        text += f": {it.metric} no longer got better"
    if it.state == "running" and (holder := holder_of(it.run.path)):
        text += f", by process {holder.get('pid')} on {holder.get('host')}"
    return text


def figures(it: Record) -> dict[str, str]:
    """What a run came to, for people; what is not known is left out."""
    figures = {
        "state": it.state,
        "steps": f"{it.steps:,}",
        f"best {it.metric}": _best(it),
        "training loss": number(next(reversed(it.series("loss").values()), None)),
        "epochs": number(it.result.get("epoch") or next(reversed(it.series("epoch").values()), None)),
        "tokens computed": _count(it.result.get("tokens")),
        "tokens/s": _count(it.tokens_per_second),
        "wall time": duration(it.wall_s),
        "workers": " → ".join(str(attempt.workers) for attempt in it.attempts[-8:]),
        "restarts": restarts(it),
        "steps left out (not finite)": _count(it.result.get("skipped_steps") or None),
        "peak memory of a worker": size(it.peak_memory_bytes) if it.peak_memory_bytes else None,
    }
    return {name: text for name, text in figures.items() if text}


def _best(it: Record) -> str:
    return "" if it.best is None or it.best_value is None else f"{number(it.best_value)} at step {it.best.step:,}"


def restarts(it: Record) -> str:
    """How often workers were started anew, and why the ones before had ended."""
    again = max(0, len(it.attempts) - 1)
    causes = [f"{count} × {cause.replace('_', ' ')}" for cause, count in it.failures.items()]
    if (resumed := again - sum(1 for attempt in it.attempts[:-1] if attempt.failure)) > 0:
        causes.append(f"{resumed} × resumed")
    return f"{again} ({', '.join(causes)})" if causes else str(again)


def duration(seconds: float | None) -> str:
    """`1 h 02 min`, `3 min 20 s` or `12.3 s`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def until_first_step(seconds: dict[str, float]) -> list[tuple[str, float]]:
    """What passed before the first step was done, in order, of result.json's `seconds`: those of the last start."""
    parts = [name for name in PARTS if name in seconds]
    names = ["check", "ray", "prepare", *(parts or ["until_first_step"])]
    return [(_PHASES[name], float(seconds[name])) for name in names if name in seconds]


def after_first_step(seconds: dict[str, float]) -> float | None:
    """Seconds of all other steps, evaluations and saves."""
    known = "fit" in seconds and "until_first_step" in seconds
    return max(0.0, seconds["fit"] - seconds["until_first_step"]) if known else None


_PHASES = {
    "check": "settings, model and data checked",
    "ray": "Ray started or joined",
    "prepare": "data prepared",
    "start_workers": "workers started",
    "imports": "their imports",
    "model": "model loaded and sharded",
    "first_step": "first step",
    "until_first_step": "workers started, model loaded, first step",
}


def commands(it: Record) -> list[tuple[str, str]]:
    """What to type next, with what it is for."""
    run = shlex.quote(str(it.run.path))
    found = [("Repeat it from the start", f"manta train --config {run}/config.yaml --run_name {it.name}-again")]
    if it.state not in ("running", "finished"):
        found.append(("Go on with it", f"manta train --resume {run}"))
    if it.data:
        found.append(("Look at its data", f"manta inspect --prepared {shlex.quote(str(it.data['path']))}"))
    if it.checkpoints:
        found += [
            ("Write it as a Hugging Face folder", f"manta convert --run {run}"),
            ("Score it beside its base", f"manta evaluate --run {run}"),
            ("Serve it", f"manta serve --run {run}"),
            ("Compare its files with their hashes", f"manta runs verify {run}"),
        ]
    return [*found, ("Write this page anew", f"manta report --run {run}")]


def moment(seconds: float) -> str:
    """A UNIX time as this machine's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def number(value: float | None) -> str:
    """A figure, or nothing where it is not known."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"


def size(count: float) -> str:
    """Bytes for people."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:,.{1 if power else 0}f} {units[power]}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
