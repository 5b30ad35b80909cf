"""What one task of the preparation does: read a shard of a source, render, tokenize, write its part of each file."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from manta import manifest
from manta.config import Config
from manta.data import formats, tokenize
from manta.data.chat import ChatTemplate
from manta.data.formats import Conversation, Pair
from manta.data.lines import BadRow
from manta.data.source import SPLITS, Source
from manta.data.tokenize import Encoder, Rendered, Sample

TOKENIZED = ("training", "validation")
EXAMPLES = 10  # source rows named per finding
_SERVING_CHECKED = 64  # conversations of a shard whose prompts are compared with what is served
_EXCERPT = 300  # characters of a bad row in the quarantine file

_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode  # json.dumps makes an encoder for each row

# Per row of the source, for the search for equal rows.
DIGEST = np.dtype([("row", np.int64), ("split", np.int8), ("text", np.int64)])


@dataclass(frozen=True)
class Job:
    """What all tasks share. `formats` has one for each source, `splits` an index into SPLITS for each row."""

    settings: dict[str, Any]  # Config.to_dict()
    sources: tuple[Source, ...]
    formats: tuple[formats.Format, ...]
    splits: np.ndarray
    staging: Path
    encoder: Encoder | None = None  # else each process loads its own tokenizer, and for that imports torch
    template: ChatTemplate | None = None  # of conversations
    stops: tuple[str, ...] = ()  # what ends generation, of conversations

    @property
    def shards(self) -> int:
        return sum(len(source.rows.shards) for source in self.sources)

    @property
    def rows(self) -> int:
        return sum(len(source) for source in self.sources)

    def source_of(self, shard: int) -> int:
        return max(index for index, source in enumerate(self.sources) if source.first_shard <= shard)


class _Text(NamedTuple):
    """A usable row on its way to tokens: what people read of it, and what is tokenized."""

    row: int
    record: Mapping[str, Any]
    rendered: Rendered


class Findings:
    """Counts of what was noticed, with the first rows and one detail of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rows: dict[str, list[int]] = {}
        self.details: dict[str, str] = {}

    def note(self, what: str, row: int, detail: str | None = None) -> None:
        self.counts[what] += 1
        if len(self.rows.setdefault(what, [])) < EXAMPLES:
            self.rows[what].append(row)
        if detail is not None:
            self.details.setdefault(what, detail)


def write_shard(job: Job, shard: int) -> dict[str, Any]:
    """Write the parts of shard `shard` under `job.staging`, its summary last; returns the summary.

    A shard whose summary stands there is not done again. Parts are the same whoever writes them, and however often.
    """
    name = f"{shard:06d}"
    done = manifest.read_json(job.staging / "done" / f"{name}.json")
    if done and all(_size(job.staging / file) == size for file, size in done["files"].items()):
        return done
    config = Config.from_dict(job.settings)
    source, found = job.sources[job.source_of(shard)], job.formats[job.source_of(shard)]
    findings = Findings()
    texts: dict[str, list[_Text]] = {split: [] for split in SPLITS}
    quarantine: list[dict[str, Any]] = []
    first = source.first_row + sum(source.rows.shards[: shard - source.first_shard])
    render = _renderer(job, source, found, config, findings)
    number = first - 1
    for number, row in enumerate(source.rows.read(shard - source.first_shard), start=first):
        try:
            text = render(number, row)
        except BadRow as error:
            where = source.rows.where(number - source.first_row)
            excerpt = "" if isinstance(row, BadRow) else json.dumps(row, default=str)[:_EXCERPT]
            quarantine.append({"row": number, "where": where, "reason": str(error), "excerpt": excerpt})
        else:
            if text is not None:
                texts[SPLITS[job.splits[number]]].append(text)

    _write_lines(job.staging / f"quarantine.jsonl.part-{name}", quarantine)
    _write_digests(job.staging / "digests" / f"part-{name}.npy", texts)
    for split, entries in texts.items():
        _write_split(job, config, split, name, entries, findings)
    summary = {
        "files": _parts(job.staging, name),
        "rows": number + 1 - first,
        "counts": dict(findings.counts),
        "first": findings.rows,
        "details": findings.details,
        "bad": len(quarantine),
        "first_bad": quarantine[:EXAMPLES],
    }
    manifest.write_json(job.staging / "done" / f"{name}.json", summary)
    return summary


def sampled_lengths(job: Job, rows: int) -> list[int]:
    """Tokens of the training samples that the first `rows` rows of each source give; rows that are bad are left out."""
    config = Config.from_dict(job.settings)
    lengths: list[int] = []
    for source, found in zip(job.sources, job.formats, strict=True):
        findings, texts = Findings(), []
        render = _renderer(job, source, found, config, findings)
        for number, row in enumerate(islice(source, rows), start=source.first_row):
            with suppress(BadRow):
                texts.append(render(number, row))
        kept = _tokenize(job, config, [text for text in texts if text is not None], findings)
        lengths += [len(sample.input_ids) for _, sample in kept]
    return lengths


def _write_split(job: Job, config: Config, split: str, name: str, entries: list[_Text], findings: Findings) -> None:
    _write_lines(job.staging / f"{split}.jsonl.part-{name}", [entry.record for entry in entries])
    findings.counts[f"{split}_rows"] += len(entries)
    if split in TOKENIZED and entries:
        samples = _tokenize(job, config, entries, findings)
        _write_arrow(job.staging / "tokenized" / split / f"part-{name}.arrow", samples)
        findings.counts[f"{split}_samples"] += len(samples)
        findings.counts[f"{split}_tokens"] += sum(len(sample.input_ids) for _, sample in samples)
        findings.counts[f"{split}_trained_tokens"] += sum(sample.trained for _, sample in samples)


def _parts(staging: Path, name: str) -> dict[str, int]:
    """Size of each file that shard `name` has."""
    files = [f"quarantine.jsonl.part-{name}", f"digests/part-{name}.npy"]
    files += [f"{split}.jsonl.part-{name}" for split in SPLITS]
    files += [f"tokenized/{split}/part-{name}.arrow" for split in TOKENIZED]
    return {file: size for file in files if (size := _size(staging / file)) is not None}


@lru_cache(maxsize=1)
def _encoder(model_id: str, trust_remote_code: bool) -> Encoder:
    return Encoder(tokenize.load_tokenizer(model_id, trust_remote_code))


def _renderer(
    job: Job, source: Source, found: formats.Format, config: Config, findings: Findings
) -> Callable[[int, Any], _Text | None]:
    """Row number and row → text, or None for a row that is left out and counted. Raises BadRow."""
    read = formats.reader(found, source.config, config.objective)
    is_chat = formats.is_chat(found, source)
    checked = 0

    def render(number: int, row: Any) -> _Text | None:
        nonlocal checked
        if isinstance(row, BadRow):
            raise row
        meaning = None if row is None else read(row)
        if meaning is None:
            findings.note("blank_line", number)
            return None
        if isinstance(meaning, Conversation) != is_chat:
            raise BadRow(f"it holds {'text' if is_chat else 'messages'}, unlike the first rows")
        if isinstance(meaning, Conversation):
            checked += 1
            return _render_chat(job, source, meaning, number, findings, checked <= _SERVING_CHECKED)
        if not meaning.output.strip():
            findings.note("empty_output", number)
            return None
        return _render_pair(meaning, number)

    return render


def _render_pair(pair: Pair, number: int) -> _Text:
    record = {"input": pair.input, "output": pair.output, "row": number}
    edge = len(pair.input)
    return _Text(number, record, Rendered(pair.input + pair.output, ((edge, edge + len(pair.output)),)))


def _render_chat(
    job: Job, source: Source, talk: Conversation, number: int, findings: Findings, check_serving: bool
) -> _Text:
    template, stops = job.template, job.stops
    assert template is not None
    rendered = template.render(talk, source.config.train_on)
    if not rendered.trained:
        raise BadRow("the chat template marks nothing of the assistant's")
    start, end = rendered.trained[-1]
    ending = rendered.text[start:end].rstrip()
    stop = next((stop for stop in stops if ending.endswith(stop)), None)
    if stop is None:
        detail = f"it ends in {ending[-30:]!r}, and generation ends at {' or '.join(stops)}"
        findings.note("stop_not_trained", number, detail)
    if lost := template.lost(talk, rendered):
        findings.note("content_lost", number, lost)
    if check_serving:
        findings.counts["serving_checked"] += 1
        if difference := template.serving_difference(talk, rendered):
            findings.note("serving_differs", number, difference)
    prompt = template.prompt(talk, talk.trained[-1])
    answer = rendered.text[len(prompt) : end] if rendered.text.startswith(prompt) else rendered.text[start:end]
    output = answer.rstrip().removesuffix(stop or "")
    record = {
        "input": prompt,
        "output": output,
        "end": answer[len(output) :],
        "row": number,
        "messages": talk.messages,
        **({"tools": talk.tools} if talk.tools else {}),
    }
    return _Text(number, record, rendered)


def _tokenize(job: Job, config: Config, entries: list[_Text], findings: Findings) -> list[tuple[int, Sample]]:
    kept = []
    encoder = job.encoder or _encoder(config.hf_model_id, config.trust_remote_code)
    for entry, whole in zip(entries, encoder.encode([entry.rendered for entry in entries]), strict=True):
        pieces = tokenize.fit(whole, config.max_seq_length, config.overlong_policy, config.objective == "cpt")
        trainable = [(entry.row, piece) for piece in pieces if piece.trains]
        if whole.merged_boundary:
            findings.note("boundary_split", entry.row)
        if not pieces:
            findings.note("overlong_dropped", entry.row)
        elif not trainable:
            findings.note("no_trained_token", entry.row)
        elif any(piece.truncated for piece in pieces):
            findings.note("truncated", entry.row)
        elif len(trainable) < len(pieces):
            findings.note("single_token_tail", entry.row)
        kept += trainable
    return kept


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which then takes its place: a task that outlives its driver cannot harm."""
    temporary = path.with_name(f"{path.name}.writing-{os.getpid()}")
    yield temporary
    temporary.replace(path)


def _write_lines(path: Path, records: list[Any]) -> None:
    if records:
        with _writing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(_as_json(record) + "\n")


def _write_digests(path: Path, texts: Mapping[str, list[_Text]]) -> None:
    digests = np.array(
        [(entry.row, index, _digest(entry.rendered)) for index, split in enumerate(SPLITS) for entry in texts[split]],
        dtype=DIGEST,
    )
    with _writing(path) as temporary, temporary.open("wb") as file:
        np.save(file, digests)


def _digest(rendered: Rendered) -> int:
    parts = repr(rendered.trained).encode() + rendered.text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big", signed=True)


def _write_arrow(path: Path, samples: list[tuple[int, Sample]]) -> None:
    import pyarrow as pa

    table = pa.table(
        {
            "input_ids": pa.array([sample.input_ids for _, sample in samples], pa.list_(pa.int32())),
            "labels": pa.array([sample.labels for _, sample in samples], pa.list_(pa.int32())),
            "row": pa.array([number for number, _ in samples], pa.int64()),
        }
    )
    with (
        _writing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
