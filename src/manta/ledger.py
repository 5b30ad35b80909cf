"""Which samples each step consumed, as the training loop saw them: the proof that none was lost or repeated.

A segment `ledger/00000060.jsonl` is written with the checkpoint of step 60, before its manifest. Its first line names
the step that its attempt started from or last saved at, so that the segments behind a checkpoint form a chain; what
an attempt did after its last checkpoint is in no chain, just as it is in no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from manta import manifest, storage

# (step, micro-batch, rows): step counts from 0, rows are indices into the tokenized training split.
Entry = tuple[int, int, list[int]]


def write(folder: Path, parent: int, step: int, entries: list[Entry]) -> None:
    """Write the segment of steps `parent` … `step`-1."""
    storage.make_folder(folder)
    lines = [json.dumps({"parent": parent, "step": step})]
    lines += [
        json.dumps({"step": number, "micro_batch": index, "rows": rows}) for number, index, rows in sorted(entries)
    ]
    manifest.write_text(_segment(folder, step), "\n".join(lines) + "\n")


def read(folder: Path, step: int) -> list[Entry]:
    """Everything that the checkpoint of `step` has consumed, in order of step and micro-batch."""
    segments = []
    while step > 0:
        lines = [json.loads(line) for line in manifest.read_text(_segment(folder, step)).splitlines()]
        segments.append([(line["step"], line["micro_batch"], line["rows"]) for line in lines[1:]])
        step = lines[0]["parent"]
    return list(_concatenated(segments))


def chain(folder: Path, step: int) -> list[str]:
    """Names of the segments behind the checkpoint of `step`, as far as they are there; the newest first."""
    names = []
    while step > 0 and _segment(folder, step).exists():
        names.append(_segment(folder, step).name)
        step = json.loads(manifest.read_text(_segment(folder, step)).partition("\n")[0])["parent"]
    return names


def _concatenated(segments: list[list[Entry]]) -> Iterator[Entry]:
    for segment in reversed(segments):
        yield from segment


def _segment(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}.jsonl"
