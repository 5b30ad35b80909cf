"""Settings in a YAML file, and settings on top of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from manta import manifest, storage
from manta.errors import ConfigError


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A YAML file's settings, without its section `launch`, which says where a run goes. Raises ConfigError."""
    return {key: value for key, value in read_yaml(path).items() if key != "launch"}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises ConfigError if it is missing or not a mapping."""
    try:
        values = yaml.safe_load(manifest.read_text(storage.place(path)))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no recipe {path}. Give --config an existing YAML file.") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(
            f"{path} cannot be read as YAML: {_where(error)}. Write `setting: value`, indented with spaces."
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}. Give --config another file.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `setting: value` lines, not {type(values).__name__}.")
    return values


def merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` on top; the nested data settings are merged key by key. Neither argument is altered."""
    result = {**base, **overrides}
    nested = [part.get("hf_dataset_config") for part in (base, overrides)]
    if all(isinstance(part, Mapping) for part in nested):
        result["hf_dataset_config"] = {**nested[0], **nested[1]}  # type: ignore[dict-item]
    return result


def nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as settings: `hfdc_…` are those of the data."""
    data = {name.removeprefix("hfdc_"): value for name, value in flags.items() if name.startswith("hfdc_")}
    settings = {name: value for name, value in flags.items() if not name.startswith("hfdc_")}
    return settings | ({"hf_dataset_config": data} if data else {})


def _where(error: yaml.MarkedYAMLError) -> str:
    """Line, its text and what is wrong with it. A line without a colon is noticed in the one after it."""
    began_it = "simple key" in (error.context or "")
    mark = (error.context_mark if began_it else None) or error.problem_mark
    if mark is None:
        return str(error.problem)
    text = (mark.get_snippet(indent=0, max_length=60) or "").partition("\n")[0]
    return f"line {mark.line + 1}, {text.strip()!r}: {error.problem}"
