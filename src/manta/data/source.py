"""Rows where the user has them: find the files, say what they are, and open them for reading in shards.

Text formats are read line by line by byte ranges, so that a broken row costs that row and no value is guessed into
another type. What has no lines (compressed files, CSV with its quotes, a JSON array, a URL) is first written out as
lines, as a stream.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from manta import diagnosis, manifest, quiet
from manta.data import lines
from manta.data.lines import SHARD_BYTES, SHARD_ROWS, BadRow
from manta.dataset_config import HFDatasetConfig
from manta.errors import ConfigError, UserError

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("training", "validation", "test")

Row = Mapping[str, Any]
_TEXT = (".json", ".jsonl", ".csv")
_KINDS = (*_TEXT, ".parquet")
_LOOKED_AT = 64  # first rows, from which the columns are known


class Rows(Protocol):
    """Rows of one kind of source; picklable, so that a task can read its shard."""

    @property
    def shards(self) -> Sequence[int]:
        """Rows of each shard."""

    def read(self, shard: int) -> Iterator[Row | BadRow | None]:
        """Each row of a shard: its values, what is wrong with it, or None for a blank line."""

    def where(self, row: int) -> str:
        """File and line of a row, for people."""


@dataclass(frozen=True)
class Table:
    """Rows that `datasets` has as memory-mapped columns. Keys that Arrow filled with null in nested values are gone."""

    dataset: Dataset
    name: str

    @property
    def per_shard(self) -> int:
        size = self.dataset.data.nbytes / max(1, len(self.dataset))
        return int(min(SHARD_ROWS, max(1, SHARD_BYTES // max(1, size))))

    @property
    def shards(self) -> list[int]:
        rows = len(self.dataset)
        return [min(self.per_shard, rows - first) for first in range(0, rows, self.per_shard)]

    def read(self, shard: int) -> Iterator[Row | BadRow | None]:
        first = shard * self.per_shard
        for row in self.dataset.select(range(first, first + self.shards[shard])):
            yield {column: without_nulls(value) for column, value in row.items()}

    def where(self, row: int) -> str:
        return f"{self.name}, row {row + 1}"


@dataclass(frozen=True)
class Source:
    """One dataset, opened: `first_row` and `first_shard` number it among the datasets of a mixture."""

    config: HFDatasetConfig
    rows: Rows
    columns: tuple[str, ...]
    examples: tuple[Row, ...]
    first_row: int = 0
    first_shard: int = 0

    def __len__(self) -> int:
        return sum(self.rows.shards)

    def __iter__(self) -> Iterator[Row | BadRow | None]:
        for shard in range(len(self.rows.shards)):
            yield from self.rows.read(shard)


def identity(config: HFDatasetConfig) -> dict[str, str]:
    """What the rows are, so that other rows are told apart: digests of files, tags of URLs, or the hub's commit.

    Raises UserError if there is no such file and the hub has no such dataset.
    """
    if "://" in config.dataset_name:
        return lines.remote_identity(config.dataset_name, _KINDS)
    path = local_path(config)
    if path is not None:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        return {file.name if file == path else str(file.relative_to(path)): manifest.sha256(file) for file in files}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return {"revision": HfApi().dataset_info(config.dataset_name, timeout=10).sha or ""}
    except OfflineModeIsEnabled:
        return {"cached": _load_from_hub(config)._fingerprint}
    except Exception as error:
        raise _unreachable(config, error) from error


def local_path(config: HFDatasetConfig) -> Path | None:
    """The file or folder that the name means, or None if it names a dataset on the hub."""
    path = Path(config.dataset_name).expanduser()
    kinds = f"{', '.join(_KINDS)}, or one of the first three with .gz"
    if path.exists():
        if path.is_file() and _kind(path.name) is None:
            raise ConfigError(f"{path}: a data file must end in {kinds}. Check --hfdc_dataset_name.")
        return path
    name = config.dataset_name
    if _kind(name) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"There is no file or folder {path}.{diagnosis.near(path)} Check --hfdc_dataset_name.")
    return None


def open_sources(config: HFDatasetConfig, cache_dir: Path) -> list[Source]:
    """All datasets of `config`, numbered one after the other. `cache_dir` receives the lines of what has none.

    Raises UserError if a dataset cannot be read or holds no usable row.
    """
    opened: list[Source] = []
    row = shard = 0
    for number, part in enumerate(config.parts()):
        one = replace(open_source(part, cache_dir / str(number)), first_row=row, first_shard=shard)
        opened.append(one)
        row, shard = row + len(one), shard + len(one.rows.shards)
    return opened


def open_source(config: HFDatasetConfig, cache_dir: Path) -> Source:
    """One dataset. Raises UserError as `open_sources` does."""
    try:
        rows = _open(config, cache_dir)
    except UserError:
        raise
    except Exception as error:
        root = error.__cause__ or error
        if "corresponds to no data" in str(root):
            raise _empty(config) from error
        reason = str(root).strip().splitlines()[0] if str(root).strip() else type(root).__name__
        raise UserError(f"{config.dataset_name} cannot be read: {reason}. Check --hfdc_dataset_name.") from error
    examples, problem = _first_rows(rows)
    if not examples:
        if problem:
            raise UserError(f"{config.dataset_name} cannot be read: {problem}. Check --hfdc_dataset_name.")
        raise _empty(config)
    columns = tuple(dict.fromkeys(column for row in examples for column in row))
    return Source(config, rows, columns, tuple(examples))


def assign_splits(rows: int, config: HFDatasetConfig, seed: int) -> np.ndarray:
    """Index into SPLITS for each row, shape (rows,), dtype int8: a seeded draw with exact counts.

    Raises UserError if evaluation is asked for and no row is left for it.
    """
    training = rows if config.train_split_ratio == 1 else round(rows * config.train_split_ratio)
    test = round((rows - training) * config.val_test_split_ratio)
    validation = rows - training - test
    if training == 0 or (config.train_split_ratio < 1 and validation == 0):
        empty = "training" if training == 0 else "validation"
        raise UserError(
            f"{rows} rows divided by train_split_ratio {config.train_split_ratio} and val_test_split_ratio "
            f"{config.val_test_split_ratio} leave the {empty} split empty. Change --hfdc_train_split_ratio "
            "(1.0 trains on everything, without evaluation) or --hfdc_val_test_split_ratio."
        )
    splits = np.repeat(np.arange(3, dtype=np.int8), [training, validation, test])
    return splits[np.random.default_rng(seed).permutation(rows)]


def without_nulls(value: Any) -> Any:
    """`value` without the null-valued keys of nested mappings: Arrow gives every struct the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _open(config: HFDatasetConfig, cache_dir: Path) -> Rows:
    name = config.dataset_name
    if "://" in name:
        copies = lines.download(name, _KINDS, cache_dir / "downloaded")
        is_file = _kind(name.split("?")[0]) is not None
        files = list(copies) if is_file else _files_of_split(cache_dir / "downloaded", config.split)
        return _open_files(files, cache_dir, copies)
    path = local_path(config)
    if path is None:
        return Table(_load_from_hub(config), name)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return Table(_load_saved(path, config.split), str(path))
    return _open_files([path] if path.is_file() else _files_of_split(path, config.split), cache_dir, {})


def _open_files(files: Sequence[Path], cache_dir: Path, names: Mapping[Path, str]) -> Rows:
    kinds = {_kind(file.name) for file in files}
    if ".parquet" not in kinds:
        return lines.open_files(files, cache_dir, names)
    if kinds != {".parquet"}:
        raise UserError(f"{files[0].parent} mixes Parquet with other files. Give them one by one, as a mixture.")
    datasets = _datasets()
    loaded = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train", cache_dir=cache_dir)
    return Table(loaded, names.get(files[0], str(files[0])) if len(files) == 1 else str(files[0].parent))


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to a split by their names, as on the hub: `train.jsonl`, `test-0.csv`.

    A folder whose names tell no split is all `train`.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    patterns = get_data_patterns(str(folder))
    if split not in patterns:
        raise UserError(
            f"Unknown split {split!r} in {folder}. Give --hfdc_split one of {[str(each) for each in patterns]}."
        )
    found = DataFilesDict.from_patterns(patterns, base_path=str(folder))[split]
    files = sorted(Path(file) for file in found if _kind(Path(file).name))
    if not files:
        raise UserError(f"{folder} cannot be read: it holds no {', '.join(_KINDS)} file. Check --hfdc_dataset_name.")
    return files


def _load_saved(path: Path, split: str) -> Dataset:
    datasets = _datasets()
    loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise UserError(f"{path} has no split {split!r}. Give --hfdc_split one of {list(loaded)}.")
    return loaded[split]


def _load_from_hub(config: HFDatasetConfig) -> Dataset:
    try:
        return _datasets().load_dataset(config.dataset_name, config.dataset_config, split=config.split)
    except Exception as error:
        raise _unreachable(config, error) from error


def _datasets() -> Any:
    import datasets

    if not quiet.is_verbose():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs as errors what it raises too
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a file of our own is no download; offline, each count stalls
    return datasets


def _kind(name: str) -> str | None:
    """The suffix that says how a file is read, without `.gz`."""
    stem = name.removesuffix(".gz")
    kind = next((kind for kind in _KINDS if stem.endswith(kind)), None)
    return None if kind == ".parquet" and stem != name else kind


def _first_rows(rows: Rows) -> tuple[list[Row], str | None]:
    """Readable rows among the first, and what is wrong with the first that is not."""
    examples: list[Row] = []
    problem = None
    for shard in range(len(rows.shards)):
        for row in rows.read(shard):
            if isinstance(row, BadRow):
                problem = problem or str(row)
            elif row is not None:
                examples.append(row)
            if len(examples) == _LOOKED_AT:
                return examples, problem
    return examples, problem


def _empty(config: HFDatasetConfig) -> UserError:
    return UserError(f"{config.dataset_name} holds no rows. Check --hfdc_dataset_name and --hfdc_split.")


def _unreachable(config: HFDatasetConfig, error: Exception) -> UserError:
    reason = diagnosis.unloadable(config.dataset_name, error, "dataset", "--hfdc_dataset_name")
    return UserError(
        f"{config.dataset_name} is neither a file or folder here nor a dataset the hub gives us: {reason}."
    )
