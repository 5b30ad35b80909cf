"""What runs where it goes: the recipe as that place needs it, its command line, and the environment of its hosts."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from manta import storage
from manta.config import Config
from manta.dataset_config import HFDatasetConfig
from manta.errors import UserError
from manta.launch.config import LaunchConfig
from manta.launch.rendered import to_yaml
from manta.runs import default_name

MANTA = "manta"
_TEMPLATES = {"hfdc_input_template", "hfdc_output_template"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def placed(config: Config, launch: LaunchConfig, gpus: int) -> Config:
    """`config` with a name that every attempt shares, and a worker for each GPU of the hosts (`gpus` each, or CPUs)."""
    fewest, most = launch.node_range
    each = max(1, gpus)
    workers = fewest * each if fewest == most else f"{fewest * each}:{most * each}"
    update: dict[str, Any] = {"run_name": config.run_name or default_name(config)}
    if config.num_workers is None:
        update["num_workers"] = workers
    if config.device == "auto":
        update["device"] = "cuda" if gpus else "cpu"
    return Config.from_dict(config.to_dict() | update)


def flags(config: Config) -> dict[str, str]:
    """What differs from the defaults, as flags of `manta train`: what the guide calls hyperparameters."""
    default = Config()
    data, data_default = config.hf_dataset_config, default.hf_dataset_config
    given = {name: getattr(config, name) for name in Config.model_fields if name != "hf_dataset_config"}
    before = {name: getattr(default, name) for name in given}
    given |= {f"hfdc_{name}": getattr(data, name) for name in HFDatasetConfig.model_fields}
    before |= {f"hfdc_{name}": getattr(data_default, name) for name in HFDatasetConfig.model_fields}
    plain = config.to_dict()
    plain |= {f"hfdc_{name}": value for name, value in plain.pop("hf_dataset_config").items()}
    found = {name: _text(plain[name]) for name, value in given.items() if value != before[name] and value is not None}
    for name in _TEMPLATES & found.keys():  # one line, as a shell hands them over
        found[name] = found[name].replace("\n", "\\n").replace("\t", "\\t")
    return found


def recipe(config: Config) -> str:
    """What differs from the defaults, as the YAML of a recipe."""
    default, given = Config().to_dict(), config.to_dict()
    data, before = given.pop("hf_dataset_config"), default.pop("hf_dataset_config")
    found = {name: value for name, value in given.items() if value != default[name]}
    data = {name: value for name, value in data.items() if value != before[name]}
    return to_yaml(found | ({"hf_dataset_config": data} if data else {}))


def train_command(config: Config, *more: str) -> list[str]:
    return [MANTA, "train", *(part for name, value in flags(config).items() for part in (f"--{name}", value)), *more]


def convert_command(config: Config) -> list[str]:
    return [MANTA, "convert", "--run", f"{config.results_dir.rstrip('/')}/{config.run_name}"]


def shell(config: Config, launch: LaunchConfig, *more: str) -> str:
    """Train, and write the merged model once that has finished: a run that was asked to stop leaves with 75."""
    commands = [train_command(config, *more)] + ([convert_command(config)] if launch.export else [])
    return " && ".join(map(shlex.join, commands))


def environment(launch: LaunchConfig) -> dict[str, str]:
    """Variables of every host, without the secrets."""
    found: dict[str, str] = dict(_OFFLINE) if launch.offline else {}
    if launch.network_interface:
        found |= {"NCCL_SOCKET_IFNAME": launch.network_interface, "GLOO_SOCKET_IFNAME": launch.network_interface}
    return found | launch.env


def check_places(config: Config, shared: Iterable[str] = ()) -> None:
    """Raises UserError if results or data would be where the hosts' containers cannot keep or find them.

    `shared`: folders that all of them see. A path that is not on this machine may be in the image.
    """
    shared = tuple(shared)
    where = f"a folder below {' or '.join(shared)}, or s3://…" if shared else "a URL such as s3://bucket/runs"
    if not _is_shared(config.results_dir, shared):
        raise UserError(
            f"results_dir {config.results_dir} would be lost with its container, and hosts would not share it. "
            f"Set --results_dir to {where}."
        )
    sources = [part.dataset_name for part in config.hf_dataset_config.parts()]
    for name, flag in (
        *((source, "hfdc_dataset_name") for source in sources),
        (config.hf_model_id, "hf_model_id"),
        *([(config.chat_template, "chat_template")] if config.chat_template else []),
    ):
        if not _is_shared(name, shared) and Path(name).expanduser().exists():
            raise UserError(
                f"{flag} {name} is on this machine, not on the hosts. Copy it, and give {where}, or a name on the hub."
            )


def label(name: str, longest: int) -> str:
    """`name` as Kubernetes and SageMaker allow: lower case, digits and single hyphens, a letter first."""
    text = re.sub(r"-+", "-", re.sub(r"[^a-z0-9]+", "-", name.lower())).strip("-")
    if not text or not text[0].isalpha():
        text = f"run-{text}"
    return text[:longest].strip("-")


def _is_shared(name: str, shared: tuple[str, ...]) -> bool:
    return storage.is_remote(name) or any(Path(name).is_relative_to(folder) for folder in shared)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
