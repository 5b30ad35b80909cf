"""Prepared data: a folder per fingerprint, made once by a Ray Data job on CPUs, then only read.

prepared/<fingerprint>/
    training.jsonl, validation.jsonl, test.jsonl     input, output and source row (and messages), for people
    tokenized/{training,validation}/part-*.arrow     input_ids, labels and source row, memory-mapped by the workers
    packs.npz                                        which samples share a sequence, where packing or weights say so
    chat_template.jinja                              of conversations: what the tuned model is served with
    quarantine.jsonl                                 rows that could not be used: row, file and line, reason
    manifest.json                                    what shaped it, counts, findings, digests; written last
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manta import manifest, storage
from manta.config import Config
from manta.data import formats, lint, packing, source, tasks, tokenize
from manta.data.chat import load_chat_template
from manta.data.packing import Packs
from manta.data.shards import TOKENIZED, Job
from manta.data.source import SPLITS
from manta.data.totals import Total
from manta.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PACKS = "packs.npz"
CHAT_TEMPLATE = "chat_template.jinja"
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Prepared:
    """A complete folder of prepared data."""

    path: Path

    def fetched(self) -> Prepared:
        """The same on this node, where its tokens can be memory-mapped."""
        return Prepared(storage.fetch(self.path))

    @property
    def about(self) -> dict[str, Any]:
        about = manifest.read(self.path)
        if about is None:
            raise UserError(f"{self.path} is not prepared data: it has no manifest. Delete it and run again.")
        return about

    @property
    def counts(self) -> dict[str, Any]:
        return self.about["counts"]

    def text(self, split: str) -> Path:
        """The readable JSONL of a split."""
        return self.path / f"{split}.jsonl"

    def tokenized(self, split: str) -> Dataset:
        """Rows with input_ids, labels and row (the source's row number), memory-mapped."""
        from datasets import Dataset, concatenate_datasets

        parts = sorted((self.path / "tokenized" / split).glob("part-*.arrow"))
        return concatenate_datasets([Dataset.from_file(str(part)) for part in parts])

    def lengths(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, source row) of each sample of a split, without reading the tokens."""
        import pyarrow.compute as pc

        tables = list(self.tokenized(split).with_format("arrow").iter(1 << 16))
        lengths = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
        return np.concatenate(lengths).astype(np.int64), np.concatenate([table["row"].to_numpy() for table in tables])

    def chat_template(self) -> str | None:
        """What the tuned model is served with, if it was tuned on conversations."""
        path = self.path / CHAT_TEMPLATE
        return path.read_text(encoding="utf-8") if path.exists() else None

    def packs(self) -> Packs | None:
        """The sequences of training where a sequence is not one sample."""
        return Packs.load(self.path / PACKS) if (self.path / PACKS).exists() else None

    @cached_property
    def sequences(self) -> np.ndarray:
        """Tokens of each sequence of training."""
        lengths, packs = self.lengths("training")[0], self.packs()
        return lengths if packs is None else packs.tokens(lengths)


def locate(config: Config) -> tuple[Prepared, dict[str, Any]]:
    """Where the prepared data of `config` is or will be, and what shapes it. Raises UserError on unusable input."""
    data = config.hf_dataset_config
    template = Path(config.chat_template) if config.chat_template else None
    parts = {
        "data": [source.identity(part) for part in data.parts()],
        "settings": [part.model_dump(exclude={"dataset_name", "num_proc", "mixture"}) for part in data.parts()],
        "chat_template": manifest.sha256(template) if template and template.is_file() else config.chat_template,
        "chat_template_kwargs": config.chat_template_kwargs,
        "objective": config.objective,
        "max_seq_length": config.max_seq_length,
        "overlong_policy": config.overlong_policy,
        "packing": config.packing,
        "seed": config.seed,
        "tokenizer": tokenize.identity(config.hf_model_id, config.trust_remote_code),
        "code": manifest.fingerprint({path.name: manifest.sha256(path) for path in Path(__file__).parent.glob("*.py")}),
    }
    return Prepared(storage.place(config.data_dir) / manifest.fingerprint(parts)), parts


def is_ready(prepared: Prepared) -> bool:
    """Whether the folder is complete and every file has its size (content was hashed when it was written)."""
    return manifest.damage(prepared.path, content=False) is None


def open_job(config: Config, prepared: Prepared) -> Job:
    """The sources, opened, with their formats and splits. Raises UserError on bad input, before anything is made."""
    storage.check(config.data_dir, "data_dir")
    cache = _cache(prepared)
    try:
        sources = source.open_sources(config.hf_dataset_config, cache)
        found = tuple(formats.detect(each, config.objective) for each in sources)
        if any(formats.is_chat(*each) for each in zip(found, sources, strict=True)):
            tokenizer = tokenize.load_tokenizer(config.hf_model_id, config.trust_remote_code)
            template = load_chat_template(tokenizer, config.chat_template, config.chat_template_kwargs)
            stops = tuple(tokenize.stop_tokens(config.hf_model_id, tokenizer))
        else:
            template, stops = None, ()
        splits = source.assign_splits(sum(map(len, sources)), config.hf_dataset_config, config.seed)
    except BaseException:
        forget_sources(prepared)
        raise
    near = storage.near(prepared.path)
    staging = near.with_name(f".staging-{near.name}")
    return Job(config.to_dict(), tuple(sources), found, splits, staging, template=template, stops=stops)


def forget_sources(prepared: Prepared) -> None:
    """Remove the lines that `open_job` made of other formats."""
    shutil.rmtree(_cache(prepared), ignore_errors=True)


def prepare(
    config: Config,
    prepared: Prepared,
    parts: dict[str, Any],
    job: Job,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    here: bool = False,
) -> None:
    """Make the folder `prepared`, as a Ray Data job on this node (Ray must be running), or `here`, in this process.

    `on_rows(done, total)` is called as shards end. After a kill the same call goes on from the shards that were done.
    Of two processes that prepare the same data, one waits for the other. Raises UserError if no row is usable, too
    many rows are bad, or the overlong policy is "error". A remote folder is made in this node's cache, and uploaded.
    """
    near = Prepared(storage.near(prepared.path))
    near.path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(near):
        try:
            if not is_ready(near):
                _make(config, near, parts, job, on_rows, here)
            if not is_ready(prepared):
                storage.publish(near.path, prepared.path)
        except UserError:  # the same rows would end the same way again
            shutil.rmtree(job.staging, ignore_errors=True)
            raise
        finally:
            forget_sources(prepared)


def _make(
    config: Config,
    prepared: Prepared,
    parts: dict[str, Any],
    job: Job,
    on_rows: Callable[[int, int], None],
    here: bool,
) -> None:
    for folder in ("done", "digests", *(f"tokenized/{split}" for split in TOKENIZED)):
        (job.staging / folder).mkdir(parents=True, exist_ok=True)
    encoder = tokenize.Encoder(tokenize.load_tokenizer(config.hf_model_id, config.trust_remote_code))
    job = replace(job, encoder=None if encoder.slow else encoder)  # Python code that came with a model cannot travel
    total = Total()
    for summary in (tasks.here if here else tasks.on_ray)(config, job):
        total.add(summary)
        if total.bad > config.bad_rows_limit * job.rows:
            raise UserError(_too_many_bad(config, job, total))
        on_rows(total.rows, job.rows)
    counts = total.counts_of_splits(config)
    counts["noted"] |= lint.equal_rows(_digests(job.staging))
    for name in (*(f"{split}.jsonl" for split in SPLITS), QUARANTINE):
        _join(job.staging, name)
    staged = replace(prepared, path=job.staging)
    counts["training"] |= _arrange(config, staged, job, counts["training"]["samples"])
    counts |= {"rows": job.rows, "quarantined": total.bad}
    if job.template:
        manifest.write_text(job.staging / CHAT_TEMPLATE, job.template.published)
    about = {
        "model": config.hf_model_id,
        "chat_template": job.template.name if job.template else None,
        "sources": [
            {"name": each.config.dataset_name, "format": found, "columns": each.columns, "first_row": each.first_row}
            for each, found in zip(job.sources, job.formats, strict=True)
        ],
        "max_seq_length": config.max_seq_length,
    }
    for folder in ("done", "digests"):
        shutil.rmtree(job.staging / folder)
    for leftover in job.staging.rglob("*.writing-*"):
        leftover.unlink(missing_ok=True)
    manifest.close(
        job.staging,
        manifest.digests(job.staging),
        {"kind": "prepared data", "made_from": parts, **about, "counts": counts},
    )
    shutil.rmtree(prepared.path, ignore_errors=True)  # damaged, or it would be ready
    job.staging.rename(prepared.path)


def _too_many_bad(config: Config, job: Job, total: Total) -> str:
    """The message, which points to all bad rows so far: they are kept beside the prepared data."""
    kept = job.staging.parent / f"quarantine-{job.staging.name.removeprefix('.staging-')}.jsonl"
    _join(job.staging, QUARANTINE)
    (job.staging / QUARANTINE).replace(kept)
    listed = "; ".join(f"{bad['where']}: {bad['reason']}" for bad in total.first_bad[:3])
    return (
        f"{total.bad:,} of {total.rows:,} rows cannot be used, over bad_rows_limit {config.bad_rows_limit:g} ({listed}"
        f"{'; …' if total.bad > 3 else ''}). All of them: {kept}. Mend them, or raise --bad_rows_limit."
    )


def _arrange(config: Config, prepared: Prepared, job: Job, samples: int) -> dict[str, Any]:
    """Write which samples share a sequence, if not each has its own; returns `sequences` and `fill`."""
    weights = [part.weight for part in config.hf_dataset_config.parts()]
    if not config.packing and set(weights) == {1.0}:
        return {"sequences": samples}
    lengths, rows = prepared.lengths("training")
    firsts = [each.first_row for each in job.sources]
    part_of = np.searchsorted(firsts, rows, side="right") - 1
    epoch = packing.repeated(np.array(weights)[part_of], config.seed)
    if not len(epoch):
        raise UserError("The weights leave no training sample. Raise a weight.")
    packs = packing.pack(lengths, epoch, config.max_seq_length) if config.packing else Packs.singly(epoch)
    packs.save(prepared.path / PACKS)
    figures: dict[str, Any] = {"sequences": len(packs)}
    return figures | ({"fill": round(packing.fill(packs, lengths, config.max_seq_length), 4)} if config.packing else {})


def _digests(staging: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted((staging / "digests").glob("*.npy"))])


def _join(staging: Path, name: str) -> None:
    with (staging / name).open("wb") as joined:
        for part in sorted(staging.glob(f"{name}.part-*")):
            if ".writing-" in part.name:  # left by a task that was killed
                continue
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined)
            part.unlink()


@contextlib.contextmanager
def _alone(prepared: Prepared) -> Iterator[None]:
    """Hold the lock of this folder, which the system gives back when the process ends, however it ends."""
    path = prepared.path.with_name(f".lock-{prepared.path.name}")
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                is_there = path.stat().st_ino == os.fstat(lock.fileno()).st_ino
            except FileNotFoundError:
                is_there = False
            if not is_there:  # the holder before us removed the file, and others lock a new one
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _cache(prepared: Prepared) -> Path:
    """This process's own; those that killed processes of this host left are removed."""
    host = socket.gethostname()
    near = storage.near(prepared.path)
    for left in near.parent.glob(f".source-*-{host}-*"):
        if Path("/proc/self").exists() and not Path("/proc", left.name.rpartition("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    return near.with_name(f".source-{near.name}-{host}-{os.getpid()}")
