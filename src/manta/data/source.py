"""Rows as the user has them, and what a row says: open a source, render templates, divide into splits."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from manta import manifest
from manta.config import HFDatasetConfig, template_fields
from manta.errors import ConfigError, UserError

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("training", "validation", "test")
Objective = Literal["sft", "cpt"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def identity(source: HFDatasetConfig) -> dict[str, str]:
    """What the rows are, so that other rows are told apart: file digests, or the hub's commit.

    Raises UserError if there is no such file and the hub has no such dataset.
    """
    path = local_path(source)
    if path is not None:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        return {file.name if file == path else str(file.relative_to(path)): manifest.sha256(file) for file in files}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return {"revision": HfApi().dataset_info(source.dataset_name, timeout=10).sha or ""}
    except OfflineModeIsEnabled:
        return {"cached": _load_from_hub(source, None)._fingerprint}
    except Exception as error:
        raise _unreachable(source, error) from error


def local_path(source: HFDatasetConfig) -> Path | None:
    """The file or folder that the name means, or None if it names a dataset on the hub."""
    path = Path(source.dataset_name).expanduser()
    if path.exists():
        if path.is_file() and path.suffix not in _BUILDERS:
            raise ConfigError(f"{path}: a data file must end in {', '.join(_BUILDERS)}.")
        return path
    name = source.dataset_name
    if path.suffix in _BUILDERS or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"There is no file or folder {path}. Check --hfdc_dataset_name.")
    return None


def open_rows(source: HFDatasetConfig, cache_dir: Path) -> Dataset:
    """All rows of the asked split, memory-mapped. `cache_dir` receives the Arrow files made of text formats.

    Raises UserError if the data cannot be read or holds no row.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs as errors what it raises too
    path = local_path(source)
    try:
        if path is None:
            rows = _load_from_hub(source, cache_dir)
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, datasets.DatasetDict):
                if source.split not in rows:
                    raise UserError(f"{path} has no split {source.split!r}. Give --hfdc_split one of {list(rows)}.")
                rows = rows[source.split]
        else:
            rows = _load_files(path, source.split, cache_dir)
    except UserError:
        raise
    except Exception as error:
        root = error.__cause__ or error
        if (path and _is_empty(path)) or "corresponds to no data" in str(root):
            raise UserError(f"{source.dataset_name} holds no rows. Check --hfdc_dataset_name.") from error
        reason = str(root).strip().splitlines()[0] if str(root).strip() else type(root).__name__
        raise UserError(f"{source.dataset_name} cannot be read: {reason}. Check --hfdc_dataset_name.") from error
    if len(rows) == 0:
        raise UserError(f"{source.dataset_name} holds no rows. Check --hfdc_dataset_name and --hfdc_split.")
    return rows


def check_columns(source: HFDatasetConfig, columns: list[str], objective: Objective) -> None:
    """Raises ConfigError if a template names a field that no column provides."""
    templates = {"output_template": source.output_template}
    if objective == "sft":
        templates["input_template"] = source.input_template
    for name, template in templates.items():
        for field in template_fields(template):
            column = source.field_mapping.get(field, field)
            if column not in columns:
                nearest = difflib.get_close_matches(column, columns, n=1)
                hint = (
                    f"Did you mean {nearest[0]}?"
                    if nearest
                    else "Change the template, or map it: --hfdc_field_mapping."
                )
                asked = f"{{{field}}}" if column == field else f"{{{field}}}, mapped to the column {column}"
                raise ConfigError(f"{name} asks for {asked}, but the data has the columns {columns}. {hint}")


def render(source: HFDatasetConfig, row: Mapping[str, Any], objective: Objective) -> tuple[str, str]:
    """`row` through the templates: (input, output). Continual pre-training has no input."""
    inputs = "" if objective == "cpt" else _fill(source.input_template, source, row)
    return inputs, _fill(source.output_template, source, row)


def assign_splits(rows: int, source: HFDatasetConfig, seed: int) -> np.ndarray:
    """Index into SPLITS for each row, shape (rows,), dtype int8: a seeded draw with exact counts.

    Raises UserError if evaluation is asked for and no row is left for it.
    """
    training = rows if source.train_split_ratio == 1 else round(rows * source.train_split_ratio)
    test = round((rows - training) * source.val_test_split_ratio)
    validation = rows - training - test
    if training == 0 or (source.train_split_ratio < 1 and validation == 0):
        empty = "training" if training == 0 else "validation"
        raise UserError(
            f"{rows} rows divided by train_split_ratio {source.train_split_ratio} and val_test_split_ratio "
            f"{source.val_test_split_ratio} leave the {empty} split empty. Change --hfdc_train_split_ratio "
            "(1.0 trains on everything, without evaluation) or --hfdc_val_test_split_ratio."
        )
    splits = np.repeat(np.arange(3, dtype=np.int8), [training, validation, test])
    return splits[np.random.default_rng(seed).permutation(rows)]


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hex digits over everything that shapes prepared data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _fill(template: str, source: HFDatasetConfig, row: Mapping[str, Any]) -> str:
    values = {field: _text(row[source.field_mapping.get(field, field)]) for field in template_fields(template)}
    return template.format_map(values)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)


def _load_files(path: Path, split: str, cache_dir: Path) -> Dataset:
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a file of our own is no download; offline, each count stalls

    def load(**options: Any) -> Dataset:
        if path.is_file():  # one file is one split, which `datasets` calls train
            files = {"path": _BUILDERS[path.suffix], "data_files": glob.escape(str(path)), "split": "train"}
        else:
            files = {"path": str(path), "split": split}
        return datasets.load_dataset(**files, cache_dir=str(cache_dir), **options)

    rows = load()
    # Values are text for a template. The readers guess types from them, which turns 007 into 7, the answer None into
    # no answer, and 2024-05-01 into a moment: such columns are read again, as they are written.
    text = datasets.Value("string")
    if rows.info.builder_name == "csv":
        return load(features=datasets.Features(dict.fromkeys(rows.column_names, text)), keep_default_na=False)
    dated = {name: datasets.Json() for name, feature in rows.features.items() if "timestamp" in str(feature)}
    if rows.info.builder_name == "json" and dated:
        return load(features=datasets.Features({**rows.features, **dated}))
    return rows


def _load_from_hub(source: HFDatasetConfig, cache_dir: Path | None) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(source.dataset_name, source.dataset_config, split=source.split)
    except Exception as error:
        raise _unreachable(source, error) from error


def _unreachable(source: HFDatasetConfig, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{source.dataset_name} is neither a file or folder here nor a dataset the hub gives us ({reason}). "
        "Check --hfdc_dataset_name; for a private dataset set HF_TOKEN."
    )


def _is_empty(path: Path) -> bool:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return all(not file.read_bytes().strip() for file in files)
