"""What a run's folder says of it, as far as it can be read: of a run under way, killed, failed, or damaged."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from manta import manifest, storage
from manta.config import Config
from manta.data import lint
from manta.data.figures import left_out, of_split
from manta.data.prepare import Prepared
from manta.data.source import SPLITS
from manta.errors import UserError
from manta.history import state
from manta.recipe import read_yaml
from manta.runs import METRIC, Checkpoint, Run, open_run

Points = dict[int, float]  # by step


@dataclass(frozen=True)
class Attempt:
    """Workers that trained together, from `first_step` on. Times are UNIX seconds; `end` is the last sign of them.

    `failure` is the event that says why they ended, if that was not the driver's end.
    """

    number: int
    workers: int
    begin: float
    end: float
    first_step: int
    last_step: int
    failure: dict[str, Any] | None


@dataclass(frozen=True)
class Record:
    """A run as its files have it at one moment."""

    run: Run
    state: str
    config: Config | None  # None: of another version of Manta, or unreadable
    settings: dict[str, Any]  # every setting by its name; those of the data as hfdc_…, like their flags
    events: list[dict[str, Any]]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    result: dict[str, Any]  # empty if it has not ended
    data: dict[str, Any]  # of the prepared folder: path, about, splits, findings, left_out; empty if it is gone
    checkpoints: list[Checkpoint]
    best: Checkpoint | None
    evaluation: dict[str, Any]  # evaluation/metrics.json, if there is one
    problems: list[str]  # what cannot be read

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def changed(self) -> dict[str, Any]:
        """Settings that are not the default. Folders by default are written in full, and are none."""
        return {name: value for name, value in self.settings.items() if not _is_default(name, value)}

    @property
    def metric(self) -> str:
        return str(self.settings.get("metric_for_best", METRIC))

    @property
    def setup(self) -> dict[str, Any]:
        """What was chosen at the last start of workers: dtype, attention, layout, versions."""
        return next((event for event in reversed(self.events) if event["kind"] == "setup"), {})

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Oldest first."""
        begun = [event for event in self.events if event["kind"] == "attempt"]
        ends = [*(event["time"] for event in begun), math.inf][1:]
        signs: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for one in (*self.events, *self.lines):
            if "attempt" in one:
                signs[one["attempt"]].append(one)
        return [_attempt(event, until, signs[event["attempt"]]) for event, until in zip(begun, ends, strict=True)]

    @property
    def failures(self) -> Counter[str]:
        """How often attempts ended by each cause."""
        return Counter(event["cause"] for event in self.events if event["kind"] == "failure")

    def running(self) -> Callable[[float], float]:
        """UNIX time → seconds in which some driver had the run: what passed between its starts is left out."""
        pauses = [(a.end, b.begin) for a, b in pairwise(self.attempts) if not a.failure]
        start = self.attempts[0].begin if self.attempts else 0.0

        def clock(moment: float) -> float:
            return moment - start - sum(min(moment, end) - begin for begin, end in pauses if begin < moment)

        return clock

    @property
    def wall_s(self) -> float | None:
        """Seconds from the first attempt to the last sign of the run, without pauses between drivers."""
        return self.running()(self.attempts[-1].end) if self.attempts else None

    def series(self, key: str) -> Points:
        """A logged value by step. A step that was done again counts as it was done last."""
        return {line["step"]: line[key] for line in self.lines if isinstance(line.get(key), int | float)}

    def speed(self) -> Points:
        """Tokens per second between two log lines of the same workers, by step."""
        found: Points = {}
        counted = [line for line in self.lines if "tokens" in line and "loss" in line]
        for before, line in pairwise(counted):
            seconds, tokens = line["time"] - before["time"], line["tokens"] - before["tokens"]
            if before.get("attempt") == line.get("attempt") and seconds > 0 and tokens > 0:
                found[line["step"]] = tokens / seconds
        return found

    @property
    def tokens_per_second(self) -> float | None:
        """As the run's end has it, or of what is logged so far."""
        if self.result.get("tokens_per_second"):
            return self.result["tokens_per_second"]
        speeds = sorted(self.speed().values())
        return speeds[len(speeds) // 2] if speeds else None

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        logged = [line["step"] for line in self.lines] + [attempt.last_step for attempt in self.attempts]
        return self.result.get("steps") or max(logged, default=0)

    @property
    def best_value(self) -> float | None:
        if self.best is None:
            return None
        return (self.best.metrics if self.metric == METRIC else self.answers.get(self.best.path.name, {})).get(
            self.metric
        )

    @property
    def answers(self) -> dict[str, dict[str, Any]]:
        """Figures of generated answers by the checkpoint's name."""
        return {event["checkpoint"]: event for event in self.events if event["kind"] == "validation"}

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most that rank 0 had."""
        return max((line["peak_memory_bytes"] for line in self.lines if "peak_memory_bytes" in line), default=None)


def _attempt(event: dict[str, Any], until: float, signs: list[dict[str, Any]]) -> Attempt:
    failure = next((one for one in signs if one["kind"] == "failure"), None)
    end = max(one["time"] for one in signs if one["time"] <= until)
    last = max(one["step"] for one in signs if "step" in one)
    return Attempt(event["attempt"], event["world_size"], event["time"], end, event["step"], last, failure)


def read(run: Run) -> Record:
    """Read a run's folder. Nothing in it that is missing or broken is an error; it is in `problems`."""
    problems: list[str] = []

    def tried(what: str, read_it: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read_it()
        except Exception as error:  # of YAML, JSON, a store's client, a folder that is gone
            reason = str(error).strip().splitlines()
            problems.append(f"{what}: {reason[0] if reason else type(error).__name__}")
            return otherwise

    config = tried("config.yaml", run.config, None)
    values = config.to_dict() if config else tried("config.yaml", lambda: read_yaml(run.config_file), {})
    events = tried("events.jsonl", lambda: _kept(run.events_file, ("time", "kind"), _NEEDED), [])
    lines = tried("metrics.jsonl", lambda: _kept(run.metrics_file, ("time", "step", "kind"), {}), [])
    return Record(
        run,
        tried("lease.json", lambda: state(run), "unknown"),
        config,
        _flat(values),
        events,
        lines,
        tried("result.json", lambda: run.result() or {}, {}),
        tried("the prepared data", lambda: _data(run, config), {}),
        tried("checkpoints", run.checkpoints, []),
        tried("checkpoints", run.best, None),
        manifest.read_json(run.path / "evaluation" / "metrics.json") or {},
        sorted(set(problems), key=problems.index),
    )


# What an event of each kind must have to be told of.
_NEEDED = {
    "attempt": ("attempt", "world_size", "step"),
    "failure": ("attempt", "step", "cause", "text"),
    "validation": ("checkpoint", "step"),
    "note": ("text",),
    "checkpoint": ("step",),
}


def _kept(path: Path, keys: Sequence[str], of_kind: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    found = manifest.read_json_lines(path)
    return [one for one in found if all(key in one for key in (*keys, *of_kind.get(one.get("kind", ""), ())))]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    nested = values.get("hf_dataset_config")
    flat = {name: value for name, value in values.items() if name != "hf_dataset_config"}
    return flat | {f"hfdc_{name}": value for name, value in (nested or {}).items()}


_DEFAULTS = _flat(Config().to_dict())


def default(name: str) -> Any:
    """The default of a setting; None for one that this version of Manta does not know."""
    return _DEFAULTS.get(name)


def as_text(value: Any) -> str:
    """A setting's value for people."""
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)


def _is_default(name: str, value: Any) -> bool:
    if name in ("results_dir", "data_dir") and isinstance(value, str):
        return Path(value).name == default(name)
    return value == default(name)


def _data(run: Run, config: Config | None) -> dict[str, Any]:
    path = run.prepared()
    about = Prepared(path).about
    counts = about["counts"]
    return {
        "path": path,
        "about": about,
        "splits": _splits(Prepared(storage.near(path)), counts),
        "findings": lint.findings(counts, config.lint, config.objective) if config else [],
        "left_out": left_out(counts),
    }


def _splits(here: Prepared, counts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of each split, with the lengths of samples if they are on this node: they are worth no download."""
    if manifest.damage(here.path, content=False) is None:
        with contextlib.suppress(Exception):  # of libraries that read what is damaged all the same
            return {split: of_split(here, split) for split in SPLITS}
    return {split: counts[split] for split in SPLITS}


def open_all(names: Sequence[str]) -> list[Record]:
    """Records of the runs in these folders. Raises UserError if one is none, or is named twice."""
    runs = [open_run(name) for name in names]
    if len({str(run.path) for run in runs}) < len(runs):
        raise UserError("A run is named twice. Give two or more different runs.")
    return [read(run) for run in runs]
