"""The folder of a run: every path in one place.

results/<run>/
    config.yaml                  the resolved config; `manta train --config` repeats the run from it
    data.json                    where its prepared data is
    checkpoint_00000060/         complete once it holds manifest.json
    damaged-checkpoint_00000030/ one whose files were not as they were written, put aside
    checkpoint_manager_snapshot.json    Ray Train's own list of checkpoints
    lease.json                   which driver has the run, while one has
    events.jsonl                 attempts, saves, failures, in order
    metrics.jsonl                every log line of the training loop
    progress.json                how far it is, renewed while it runs
    ledger/                      which samples each step consumed
    logs/                        one file per worker
    result.json                  how it ended
    report.html                  all of this as one page
    export/                      what `manta convert` wrote
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manta import manifest, storage
from manta.config import Config, whole_path
from manta.errors import ConfigError, UserError

METRIC = "eval_loss"
_PREFIX = "checkpoint_"
_DATA = "data.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `step` optimizer steps done, `metrics` as evaluated at that step."""

    path: Path
    step: int
    metrics: dict[str, float]

    @property
    def eval_loss(self) -> float:
        """Infinite where no evaluation belongs to the checkpoint, so that such a one is never the best."""
        value = self.metrics.get(METRIC, math.inf)
        return math.inf if math.isnan(value) else value


def checkpoint_path(run: Path, step: int, taken: Collection[str] = ()) -> Path:
    """Where the checkpoint of `step` goes. Names in `taken` are avoided: Ray lists them, and deletes by name."""
    name = f"{_PREFIX}{step:08d}"
    again = 0
    while (chosen := f"{name}.{again}" if again else name) in taken:
        again += 1
    return run / chosen


def newest_path(run: Path, step: int) -> Path:
    """The checkpoint of `step`, as it was written last."""
    return max(run.glob(f"{_PREFIX}{step:08d}*"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX).partition(".")[0])


@dataclass(frozen=True)
class Run:
    """A run's folder, existing or not."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def here(self) -> Path:
        """This node's folder for what is written bit by bit: the run's own, or in the cache of a remote one."""
        return storage.near(self.path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def progress_file(self) -> Path:
        return self.path / "progress.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def config(self) -> Config:
        return Config.load(self.config_file)

    def prepared(self) -> Path:
        """The folder of the data that the run trains on. Raises UserError if it is not known."""
        try:
            return storage.place(json.loads(manifest.read_text(self.path / _DATA))["prepared"])
        except FileNotFoundError as error:
            raise UserError(f"{self.path} does not say which data it trained on: {_DATA} is missing.") from error

    def start(self, config: Config, prepared: Path) -> None:
        """Make the folder, with what is needed to repeat the run and to find its data; how it ended before is gone."""
        storage.make_folder(self.path)
        for file in (self.result_file, self.progress_file):
            file.unlink(missing_ok=True)
        one_start = {"stop_at_step": None, "resume_from_checkpoint": True}  # belong to this start, not to the run
        manifest.write_json(self.path / _DATA, {"prepared": str(prepared)})
        manifest.write_text(self.config_file, config.model_copy(update=one_start).dump())

    def result(self) -> dict[str, Any] | None:
        """How the run ended, or None if it has not."""
        return manifest.read_json(self.result_file)

    def events(self) -> list[dict[str, Any]]:
        """What happened, oldest first, over all starts of the run."""
        return manifest.read_json_lines(self.events_file)

    def world_sizes(self) -> list[int]:
        """Number of workers of each attempt so far."""
        return [event["world_size"] for event in self.events() if event["kind"] == "attempt"]

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        return [
            Checkpoint(path, about["step"], about["metrics"])
            for path in sorted(self.path.glob(f"{_PREFIX}*"))
            if (about := manifest.read(path))
        ]

    def latest(self) -> Checkpoint | None:
        return max(self.checkpoints(), key=lambda checkpoint: checkpoint.step, default=None)

    @property
    def metric(self) -> str:
        """What the best checkpoint is best in."""
        try:
            return self.config().metric_for_best
        except ConfigError:  # of another version of Manta
            return METRIC

    def validations(self) -> dict[str, dict[str, Any]]:
        """Figures of generated answers, by the checkpoint's name; see `validation`."""
        return {event["checkpoint"]: event for event in self.events() if event["kind"] == "validation"}

    def ranked(self) -> list[Checkpoint]:
        """Complete checkpoints, the best in `metric` first; without any figure, the newest."""
        metric, found = self.metric, self.checkpoints()
        told = {} if metric == METRIC else self.validations()

        def rank(checkpoint: Checkpoint) -> tuple[float, float, int]:
            worth = told.get(checkpoint.path.name, {}).get(metric, -math.inf)
            return -worth if told else 0.0, checkpoint.eval_loss, -checkpoint.step

        return sorted(found, key=rank)

    def best(self) -> Checkpoint | None:
        return next(iter(self.ranked()), None)

    def best_value(self) -> float | None:
        """The best checkpoint's figure in `metric`, if it has one."""
        best = self.best()
        if best is None:
            return None
        return (best.metrics if self.metric == METRIC else self.validations().get(best.path.name, {})).get(self.metric)

    def remove_unfinished(self) -> list[str]:
        """Delete checkpoint folders that a killed worker left without a manifest; returns their names."""
        unfinished = [path for path in self.path.glob(f"{_PREFIX}*") if path.is_dir() and manifest.read(path) is None]
        for path in unfinished:
            storage.remove(path)
        return [path.name for path in unfinished]


def default_name(config: Config) -> str:
    """`Qwen3-8B-lora-1f2e3d4c`: the same settings give the same run, others another one."""
    model = Path(config.hf_model_id.rstrip("/")).name or "model"
    kind = "full" if config.full_ft else "lora"
    return f"{model}-{kind}-{config.fingerprint()[:8]}"


def of(config: Config) -> Run:
    """The run that `config` names, by `run_name` or by its own settings."""
    return Run(storage.place(config.results_dir) / (config.run_name or default_name(config)))


def find(results_dir: str | Path, base_model: str | None = None, full_ft: bool | None = None) -> Run:
    """The one run in `results_dir` with checkpoints of this base model.

    Raises UserError if there is none, and if there are several: which one is meant is never guessed.
    """
    wanted = f" of {base_model}" if base_model else ""
    runs = []
    for path in sorted(storage.place(results_dir).glob("*/config.yaml")):
        run = Run(path.parent)
        config = run.config()
        if (base_model and whole_path(base_model) != config.hf_model_id) or full_ft not in (None, config.full_ft):
            continue
        if run.checkpoints():
            runs.append(run)
    if not runs:
        raise UserError(f"No run{wanted} with a checkpoint in {results_dir}. Train one, or give --checkpoints_dir.")
    if len(runs) > 1:
        listed = "\n".join(f"  --run {run.path}" for run in runs)
        raise UserError(f"{len(runs)} runs{wanted} have checkpoints; say which one is meant:\n{listed}")
    return runs[0]


def open_run(path: str | Path) -> Run:
    """The run at `path`. Raises UserError if there is none."""
    run = Run(storage.place(path))
    if not run.config_file.is_file():
        raise UserError(f"{path} is not a run: it has no config.yaml. Give --run a folder that `manta train` made.")
    return run
