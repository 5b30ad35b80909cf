"""What is served: models by name, and which of them share one copy of the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manta import runs, storage
from manta.config import Config
from manta.convert import usable_checkpoint
from manta.data.prepare import Prepared
from manta.errors import UserError
from manta.model import WEIGHTS
from manta.runs import Run

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Model:
    """One name that a client can ask for. `adapter` is a folder that PEFT loads over the weights.

    `prompt_template` is how the prompts of its training data were written, and `example` one of its test split.
    """

    name: str
    tokenizer: str
    adapter: str | None = None
    chat_template: str | None = None
    prompt_template: str | None = None
    example: str | None = None
    tuned: bool = True


@dataclass(frozen=True)
class Weights:
    """One copy of weights in memory (a hub id or a folder), and the models that it serves."""

    source: str
    models: list[Model] = field(default_factory=list)
    trust_remote_code: bool = False

    @property
    def adapters(self) -> dict[str, str]:
        return {model.name: model.adapter for model in self.models if model.adapter}


def catalog(given_runs: Sequence[str], folders: Sequence[str], with_base: bool = True) -> list[Weights]:
    """The models of runs (base, and the best checkpoint) and of converted folders, each as PATH or NAME=PATH.

    Runs over the same base share its weights. Raises UserError if there is nothing to serve, a run has no usable
    checkpoint, or two models have one name.
    """
    found: dict[str, Weights] = {}
    for name, path in map(_named, given_runs):
        run = runs.open_run(path)
        config = run.config()
        base = found.setdefault(config.hf_model_id, Weights(config.hf_model_id, [], config.trust_remote_code))
        tuned = _tuned(run, config, name or run.name)
        if with_base and not any(model.adapter is None for model in base.models):
            base.models.insert(0, replace(tuned, name=_short(config.hf_model_id), tuned=False))
        trained = str(usable_checkpoint(run).path / WEIGHTS)
        if config.full_ft:
            found[trained] = Weights(trained, [tuned], config.trust_remote_code)
        else:
            base.models.append(replace(tuned, adapter=trained))
    for name, path in map(_named, folders):
        weights = _folder(name, path)
        found.setdefault(weights.source, Weights(weights.source)).models.extend(weights.models)
    served = [weights for weights in found.values() if weights.models]
    if not served:
        raise UserError("Nothing to serve. Give --run FOLDER of a run, or --model FOLDER that `manta convert` wrote.")
    names = [model.name for weights in served for model in weights.models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Several models are named {', '.join(twice)}. Give one another name: --run NAME=FOLDER.")
    return served


def _named(given: str) -> tuple[str | None, str]:
    name, separator, path = given.partition("=")
    return (name, path) if separator and "/" not in name else (None, given)


def _short(model_id: str) -> str:
    """A hub's id as it is; the name of a local folder."""
    return Path(model_id).name if Path(model_id).is_absolute() else model_id


def _tuned(run: Run, config: Config, name: str) -> Model:
    """What a run's tuned model is asked like. A run whose prepared data is gone is served without its example."""
    data = config.hf_dataset_config
    try:
        prepared = run.prepared()
        template = Prepared(prepared).chat_template()
        example = _example(prepared / "test.jsonl")
    except (UserError, OSError):
        template = example = None
    written = None if template or config.objective == "cpt" else data.input_template or None
    return Model(name, config.hf_model_id, None, template, written, example)


def _example(path: Path) -> str | None:
    """What a user would type to get the first answer of the test split."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        row: dict[str, Any] = json.loads(file.readline() or "{}")
    asked = [message["content"] for message in row.get("messages", ()) if message.get("role") == "user"]
    return asked[0] if asked else row.get("input")


def _folder(name: str | None, path: str) -> Weights:
    """A folder of `manta convert`, or any model of transformers: a whole one, or an adapter that names its base."""
    folder = storage.place(path)
    if storage.is_remote(folder) or folder.is_dir():
        folder = storage.fetch(folder)
        known = [each for each in ("config.json", _ADAPTER) if (folder / each).is_file()]
        if not known:
            raise UserError(f"{path} is no model: it has neither config.json nor {_ADAPTER}. Give --run for a run.")
        about = json.loads((folder / "manifest.json").read_text()) if (folder / "manifest.json").is_file() else {}
        config = Config.from_dict(about["config"]) if "config" in about else None
        written = config.hf_dataset_config.input_template or None if config else None
        model = Model(name or (Path(about["run"]).name if "run" in about else folder.name), str(folder))
        model = replace(model, prompt_template=written)
        if known == [_ADAPTER]:
            base = json.loads((folder / _ADAPTER).read_text())["base_model_name_or_path"]
            return Weights(base, [replace(model, adapter=str(folder))])
        return Weights(str(folder), [model])
    return Weights(path, [Model(name or path, path, tuned=False)])  # a hub's id
