"""The page of a run: what was asked, what was chosen, what happened, what came of it, and what to type next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from manta import facts, manifest, plots, record, runs, storage
from manta.config import GENERATED, Config
from manta.data.source import SPLITS
from manta.dataset_config import HFDatasetConfig
from manta.errors import UserError
from manta.facts import duration, moment, number, size
from manta.history import in_words
from manta.page import render
from manta.plots import HALF, Mark
from manta.preparation import absolute
from manta.progress import say
from manta.record import Record
from manta.runs import METRIC, Run, default_name

SHOWN = 200  # rows of a table that grows with the run: the first and the last of more


@contextmanager
def left_behind(config: Config) -> Iterator[None]:
    """When the run of `config` has ended, also by failing, its page is there, and its place is said. What keeps a page
    from being written, such as a full disk, is said too, and is never the run's failure.
    """
    try:
        yield
    except UserError:  # before a worker began
        raise
    except BaseException:
        _leave(config)
        raise
    _leave(config)


def _leave(config: Config) -> None:
    try:
        run = runs.of(absolute(config))
        if not run.config_file.is_file():
            return  # it has not begun
        written = write(run)
    except Exception as error:
        say(Console(stderr=True, highlight=False), f"no page of the run: {error}")
    else:
        say(Console(stderr=True, highlight=False), f"Page:      {written}")


def write(run: Run, path: Path | None = None) -> Path:
    """Write the page to `path`, by default `report.html` in the run's folder; returns where. Raises UserError."""
    path = path or run.page
    text = page(record.read(run), beside=path == run.page)
    try:
        storage.make_folder(path.parent)
        manifest.write_text(path, text)
    except Exception as error:  # of a disk, or any client of a store
        raise UserError(f"{path} cannot be written ({error}). Give --html a file in a folder that can.") from error
    return path


def page(it: Record, beside: bool = True) -> str:
    """The page's HTML; `beside`: it will lie in the run's folder, so that it can point to what else is there."""
    seconds = it.result.get("seconds", {})
    return render(
        "run_page.html",
        without_secrets=True,
        it=it,
        headline=facts.headline(it),
        facts=facts.figures(it),
        setup={name.replace("_", " "): it.setup[name] for name in _CHOSEN if name in it.setup},
        settings=_settings(it),
        pictures=[Markup(picture) for picture in pictures(it) if picture],
        timeline=Markup(_timeline(it)),
        beside=beside,
        attempts=_ends(_attempts(it)),
        happened=_ends(_happened(it)),
        evaluations=_ends(_evaluations(it)),
        checkpoints=_checkpoints(it),
        splits=SPLITS,
        lineage=_lineage(it),
        until_first_step=facts.until_first_step(seconds),
        after_first_step=facts.after_first_step(seconds),
        commands=facts.commands(it),
        evaluated=_evaluated(it),
        written=moment(time.time()),
        as_text=record.as_text,
        duration=duration,
    )


_CHOSEN = ("dtype", "sharding_strategy", "attention", "layout", "gradient_checkpointing")


def pictures(it: Record) -> list[str]:
    """Curves over steps, with a line where workers were started again."""
    marks = [Mark(after.first_step, bool(before.failure)) for before, after in _pairs(it)]
    answers = {
        name: {event["step"]: event[name] for event in it.answers.values() if name in event}
        for name in sorted(GENERATED)
    }
    drawn: list[tuple[dict[str, Any], str, str]] = [
        ({"training": it.series("loss"), "validation": it.series(METRIC)}, "loss (nats per token)", "Loss"),
        (answers, "figure of answers", "Figures of generated answers"),
        ({"learning rate": it.series("learning_rate")}, "learning rate", "Learning rate"),
        ({"gradient norm": it.series("grad_norm")}, "norm of gradients", "Norm of the gradients"),
        ({"tokens/s": it.speed()}, "tokens per second", "Tokens per second"),
    ]
    return [plots.curves(series, label, f"{title} over steps", HALF, marks) for series, label, title in drawn]


def _settings(it: Record) -> list[dict[str, Any]]:
    """Every setting with its default, whether it differs, and its help."""
    fields = {**Config.model_fields, **{f"hfdc_{n}": f for n, f in HFDatasetConfig.model_fields.items()}}
    named = it.config is not None and it.settings.get("run_name") == default_name(it.config)
    return [
        {
            "name": name,
            "value": record.as_text(value),
            "default": record.as_text(record.default(name)),
            "changed": name in it.changed and not (name == "run_name" and named),
            "help": fields[name].description if name in fields else "unknown to this version of Manta",
        }
        for name, value in it.settings.items()
    ]


def _pairs(it: Record) -> list[tuple[record.Attempt, record.Attempt]]:
    return list(zip(it.attempts, it.attempts[1:], strict=False))


def _timeline(it: Record) -> str:
    clock = it.running()
    steps: dict[int, dict[float, int]] = {each.number: {clock(each.begin): each.first_step} for each in it.attempts}
    for line in it.lines:
        if line.get("attempt") in steps:
            steps[line["attempt"]][clock(line["time"])] = line["step"]
    failures = {}
    for each in it.attempts:
        if each.failure:
            failures[clock(each.end)] = steps[each.number][clock(each.end)] = each.last_step
    saved = {clock(event["time"]): event["step"] for event in it.events if event["kind"] == "checkpoint"}
    resumed = [clock(after.begin) for before, after in _pairs(it) if not before.failure]
    title = "Steps over time, with restarts and checkpoints"
    return plots.timeline(list(steps.values()), saved, failures, resumed, title)


def _attempts(it: Record) -> list[dict[str, Any]]:
    found = []
    for each in it.attempts:
        ended = it.state if each is it.attempts[-1] else "its driver's end"
        if each.failure:
            ended = f"{each.failure['cause'].replace('_', ' ')}: {each.failure['text']}"
        found.append(
            {
                "number": each.number,
                "began": moment(each.begin),
                "workers": each.workers,
                "steps": f"{each.first_step:,} … {each.last_step:,}",
                "lasted": duration(each.end - each.begin),
                "ended": ended,
                "failed": each.failure is not None and each.failure["cause"] != "resize",
            }
        )
    return found


def _happened(it: Record) -> list[tuple[str, str, str]]:
    """(when, how much it matters, what), oldest first."""
    found = [
        (moment(event["time"]), "error" if event["kind"] == "failure" else "", text)
        for event in it.events
        if (text := in_words(event))
    ]
    if it.result.get("failure"):
        found.append(("", "error", f"failed: {it.result['failure']}"))
    return found


def _evaluations(it: Record) -> list[tuple[int, float]]:
    return sorted(it.series(METRIC).items())


def _checkpoints(it: Record) -> list[dict[str, Any]]:
    """Complete ones, then folders without a manifest."""
    latest = max(it.checkpoints, key=lambda each: each.step, default=None)
    found = []
    for each in it.checkpoints:
        about = manifest.read(each.path) or {"files": {}}
        figure = (each.metrics | it.answers.get(each.path.name, {})).get(it.metric)
        marks = [name for name, one in (("best", it.best), ("newest", latest)) if one and one.path == each.path]
        total = sum(file["size"] for file in about["files"].values())
        found.append(
            {"name": each.path.name, "step": each.step, "size": size(total), "figure": number(figure), "marks": marks}
        )
    whole = {each["name"] for each in found}
    others = [path.name for path in it.run.path.glob("*checkpoint_*[0-9]") if path.name not in whole]
    nothing = {"step": "", "size": "", "figure": "", "marks": ["unfinished or damaged"]}
    return found + [{"name": name, **nothing} for name in sorted(others)]


def _lineage(it: Record) -> dict[str, str]:
    """Where the weights come from."""
    about = it.data.get("about", {})
    versions = it.setup.get("versions", {})
    found = {
        "base model": it.settings.get("hf_model_id", ""),
        "settings (fingerprint)": it.config.fingerprint() if it.config else "",
        "data (fingerprint)": it.data["path"].name if it.data else "",
        "data": ", ".join(f"{one['name']} ({one['format']})" for one in about.get("sources", [])),
        "Manta": it.result.get("manta", ""),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "folder": str(it.run.path),
    }
    return {name: str(value) for name, value in found.items() if value}


def _evaluated(it: Record) -> dict[str, Any]:
    """Figures of `manta evaluate`: {metric: {model: text}}."""
    models = it.evaluation.get("models", {})
    names = [name for name, value in next(iter(models.values()), {}).items() if isinstance(value, int | float)]
    return {name: {model: number(figures.get(name)) for model, figures in models.items()} for name in names}


def _ends(rows: list[Any]) -> dict[str, Any]:
    """Of more rows than are shown the first and the last, and how many are left out between them."""
    left = max(0, len(rows) - SHOWN)
    return {"first": rows[: SHOWN // 2] if left else rows, "left": left, "last": rows[-SHOWN // 2 :] if left else []}
