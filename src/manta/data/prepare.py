"""Prepared data: a folder per fingerprint, made once by a Ray Data job on CPUs, then only read.

prepared/<fingerprint>/
    training.jsonl, validation.jsonl, test.jsonl     input, output and source row, for people
    tokenized/{training,validation}/part-*.arrow     input_ids, labels and source row, memory-mapped by the workers
    manifest.json                                    what shaped it, counts, sizes and digests; written last
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manta import manifest
from manta.config import Config
from manta.data import source, tokenize
from manta.data.source import SPLITS
from manta.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SHARD_ROWS = 4096  # rows of one task: its memory, and the part files, do not depend on the number of CPUs
_EXAMPLES = 10  # source rows named per reason in the manifest
TOKENIZED = ("training", "validation")


@dataclass(frozen=True)
class Prepared:
    """A complete folder of prepared data."""

    path: Path

    @property
    def counts(self) -> dict[str, Any]:
        about = manifest.read(self.path)
        if about is None:
            raise UserError(f"{self.path} is not prepared data: it has no manifest. Delete it and run again.")
        return about["counts"]

    def text(self, split: str) -> Path:
        """The readable JSONL of a split."""
        return self.path / f"{split}.jsonl"

    def tokenized(self, split: str) -> Dataset:
        """Rows with input_ids, labels and row (the source's row number), memory-mapped."""
        from datasets import Dataset, concatenate_datasets

        parts = sorted((self.path / "tokenized" / split).glob("part-*.arrow"))
        return concatenate_datasets([Dataset.from_file(str(part)) for part in parts])


def locate(config: Config) -> tuple[Prepared, dict[str, Any]]:
    """Where the prepared data of `config` is or will be, and what shapes it. Raises UserError on unusable input."""
    tokenizer = tokenize.load_tokenizer(config.hf_model_id, config.trust_remote_code)
    parts = {
        "data": source.identity(config.hf_dataset_config),
        "templates": config.hf_dataset_config.model_dump(exclude={"dataset_name", "num_proc"}),
        "objective": config.objective,
        "max_seq_length": config.max_seq_length,
        "overlong_policy": config.overlong_policy,
        "seed": config.seed,
        "tokenizer": tokenize.tokenizer_digest(tokenizer),
        "code": _code_digest(),
    }
    return Prepared(Path(config.data_dir).absolute() / source.fingerprint(parts)), parts


def is_ready(prepared: Prepared) -> bool:
    """Whether the folder is complete and every file has its size (content was hashed when it was written)."""
    return manifest.damage(prepared.path, content=False) is None


def open_source(config: Config, prepared: Prepared) -> Dataset:
    """The source's rows, with the templates checked against its columns. Raises UserError before anything is made."""
    cache = prepared.path.parent / f".source-{prepared.path.name}"
    try:
        rows = source.open_rows(config.hf_dataset_config, cache)
        source.check_columns(config.hf_dataset_config, rows.column_names, config.objective)
        source.assign_splits(len(rows), config.hf_dataset_config, config.seed)
    except UserError:
        shutil.rmtree(cache, ignore_errors=True)
        raise
    return rows


def forget_source(prepared: Prepared) -> None:
    """Remove what `open_source` made of text formats."""
    shutil.rmtree(prepared.path.parent / f".source-{prepared.path.name}", ignore_errors=True)


def prepare(
    config: Config,
    prepared: Prepared,
    parts: dict[str, Any],
    rows: Dataset,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    here: bool = False,
) -> None:
    """Make the folder `prepared`, as a Ray Data job on this node (Ray must be running), or `here`, in this process.

    `on_rows(done, total)` is called as shards end. Two processes that prepare the same data at once both work; the
    first to finish publishes. Raises UserError if no row is usable or the overlong policy is "error".
    """
    prepared.path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".staging-{prepared.path.name}-", dir=prepared.path.parent))
    try:
        for split in TOKENIZED:
            (staging / "tokenized" / split).mkdir(parents=True)
        counts, done = Counter[str](), 0
        examples: dict[str, list[int]] = {}
        for shard in (_shards_here if here else _shards_on_ray)(config, rows, staging):
            done += shard["rows"]
            counts.update(shard["counts"])
            for reason, numbers in shard["examples"].items():
                examples.setdefault(reason, []).extend(numbers)
            on_rows(done, len(rows))
        _join_text(staging)
        summary = _summary(config, counts, examples)
        manifest.close(
            staging, manifest.digests(staging), {"kind": "prepared data", "made_from": parts, "counts": summary}
        )
        staging.chmod(0o755)  # temporary folders are private
        if prepared.path.exists() and not is_ready(prepared):
            shutil.rmtree(prepared.path)
        try:
            staging.rename(prepared.path)
        except OSError:
            if not is_ready(prepared):  # otherwise another process has just published the same
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        forget_source(prepared)


def _shards_here(config: Config, rows: Dataset, staging: Path) -> Iterator[dict[str, Any]]:
    splits = source.assign_splits(len(rows), config.hf_dataset_config, config.seed)
    for shard in range(-(-len(rows) // SHARD_ROWS)):
        yield write_shard(config, rows, splits, shard, staging)


def _shards_on_ray(config: Config, rows: Dataset, staging: Path) -> Iterator[dict[str, Any]]:
    import ray

    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after the import, which configures it
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.verbose_stats_logs = False
    splits = ray.put(source.assign_splits(len(rows), config.hf_dataset_config, config.seed))
    rows_ref = ray.put(rows)  # a memory-mapped dataset travels as the names of its files
    settings = config.to_dict()

    def work(shard: dict[str, Any]) -> dict[str, Any]:
        try:
            result = write_shard(
                Config.from_dict(settings), ray.get(rows_ref), ray.get(splits), int(shard["id"]), Path(staging)
            )
        except UserError as error:  # which Ray would wrap in a traceback of its own
            result = {"error": str(error)}
        return {"result": json.dumps(result)}

    shards = -(-len(rows) // SHARD_ROWS)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # the source need only exist on this node
    job = ray.data.range(shards, override_num_blocks=shards).map(
        work,
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(min(shards, config.hf_dataset_config.num_proc)),
        label_selector=here,
    )
    for row in job.iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise UserError(result["error"])
        yield result


@lru_cache(maxsize=1)
def _encoder(model_id: str, trust_remote_code: bool) -> tokenize.Encoder:
    return tokenize.Encoder(tokenize.load_tokenizer(model_id, trust_remote_code))


def write_shard(config: Config, rows: Dataset, splits: np.ndarray, shard: int, staging: Path) -> dict[str, Any]:
    """Render, divide and tokenize rows [shard·SHARD_ROWS, …); returns counts and example row numbers per reason."""
    first = shard * SHARD_ROWS
    last = min(first + SHARD_ROWS, len(rows))
    counts: Counter[str] = Counter()
    examples: dict[str, list[int]] = {}

    def note(what: str, row: int) -> None:
        counts[what] += 1
        if len(examples.setdefault(what, [])) < _EXAMPLES:
            examples[what].append(row)

    texts: dict[str, list[tuple[int, str, str]]] = {split: [] for split in SPLITS}
    for number, row in enumerate(rows.select(range(first, last)), start=first):
        prompt, answer = source.render(config.hf_dataset_config, row, config.objective)
        if answer.strip():
            texts[SPLITS[splits[number]]].append((number, prompt, answer))
        else:
            note("empty_output", number)

    for split, entries in texts.items():
        _write_text(staging / f"{split}.jsonl.part-{shard:06d}", entries)
        if split in TOKENIZED and entries:
            samples = _tokenize(config, entries, note)
            _write_arrow(staging / "tokenized" / split / f"part-{shard:06d}.arrow", samples)
            counts[f"{split}_samples"] += len(samples)
            counts[f"{split}_tokens"] += sum(len(sample.input_ids) for _, sample in samples)
            counts[f"{split}_trained_tokens"] += sum(
                label != tokenize.IGNORE for _, sample in samples for label in sample.labels
            )
        counts[f"{split}_rows"] += len(entries)
    return {"rows": last - first, "counts": counts, "examples": examples}


def _tokenize(
    config: Config, entries: list[tuple[int, str, str]], note: Callable[[str, int], None]
) -> list[tuple[int, tokenize.Sample]]:
    numbers, inputs, outputs = zip(*entries, strict=True)
    kept = []
    encode = _encoder(config.hf_model_id, config.trust_remote_code)
    for number, whole in zip(numbers, encode(inputs, outputs), strict=True):
        pieces = tokenize.fit(whole, config.max_seq_length, config.overlong_policy, config.objective == "cpt")
        trainable = [(number, piece) for piece in pieces if piece.trains]
        if whole.merged_boundary:
            note("merged_boundary", number)
        if not pieces:
            note("overlong_dropped", number)
        elif not trainable:
            note("no_trained_token", number)
        elif any(piece.truncated for piece in pieces):
            note("truncated", number)
        kept += trainable
    return kept


def _write_text(path: Path, entries: list[tuple[int, str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, prompt, answer in entries:
            file.write(json.dumps({"input": prompt, "output": answer, "row": number}, ensure_ascii=False) + "\n")


def _write_arrow(path: Path, samples: list[tuple[int, tokenize.Sample]]) -> None:
    import pyarrow as pa

    table = pa.table(
        {
            "input_ids": pa.array([sample.input_ids for _, sample in samples], pa.list_(pa.int32())),
            "labels": pa.array([sample.labels for _, sample in samples], pa.list_(pa.int32())),
            "row": pa.array([number for number, _ in samples], pa.int64()),
        }
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _join_text(staging: Path) -> None:
    for split in SPLITS:
        with (staging / f"{split}.jsonl").open("wb") as joined:
            for part in sorted(staging.glob(f"{split}.jsonl.part-*")):
                with part.open("rb") as file:
                    shutil.copyfileobj(file, joined)
                part.unlink()


def _summary(config: Config, counts: Counter[str], examples: dict[str, list[int]]) -> dict[str, Any]:
    reasons = {
        reason: {"rows": counts[reason], "first": sorted(numbers)[:_EXAMPLES]} for reason, numbers in examples.items()
    }
    needed = TOKENIZED if config.evaluates else TOKENIZED[:1]
    for split in needed:
        if not counts[f"{split}_samples"]:
            why = ", ".join(f"{reason}: {about['rows']}" for reason, about in reasons.items()) or "no row was left"
            raise UserError(
                f"No {split} sample can be trained on ({why}). Raise --max_seq_length (now {config.max_seq_length}) or "
                "check the templates."
            )
    figures = {
        split: {
            what: counts[f"{split}_{what}"]
            for what in ("rows", "samples", "tokens", "trained_tokens")
            if what == "rows" or split in TOKENIZED
        }
        for split in SPLITS
    }
    return {**figures, "noted": reasons}


def _code_digest() -> str:
    """Digest of the code that shapes prepared data, so that an upgrade of Manta never reuses what an older one made."""
    here = Path(__file__).parent
    return source.fingerprint({path.name: manifest.sha256(path) for path in here.glob("*.py")})
