"""Safetensors files as streams: what they hold, rows of one tensor, and new files written piece by piece.

The library reads whole tensors and writes whole files; here memory follows the piece in hand, whatever the size of
either. Bytes are read, not mapped, so that no page of a large file counts as this process's memory. The format is eight
bytes of length, a JSON header, and the tensors' bytes: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manta import manifest
from manta.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX = f"{WEIGHTS_FILE}.index.json"
_SHARDED = "shard-*-model-*-of-*.safetensors"  # torch's distributed checkpoint: parts of tensors, one file per rank
_CHUNK = 4 << 20  # bytes
_MAKERS = 2  # chunks at once
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Part of a tensor in one file: where its bytes are, and where in the whole its first element stands."""

    file: Path
    start: int
    nbytes: int
    corner: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in files; `dtype` as the format writes it, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of the first dimension, in the tensor's own precision."""
        parts = [(piece, _rows(piece, self.dtype, first, last)) for piece in self.pieces]
        if len(parts) == 1:
            return parts[0][1]
        whole = torch.empty((last - first, *self.shape[1:]), dtype=DTYPES[self.dtype])
        for piece, part in parts:
            low = max(piece.corner[0] - first, 0)
            box = [slice(low, low + len(part))]
            box += [slice(c, c + n) for c, n in zip(piece.corner[1:], piece.shape[1:], strict=True)]
            whole[tuple(box)] = part
        return whole


@dataclass(frozen=True)
class Planned:
    """A tensor to write. `chunks` yields what makes its bytes, in order; two are made at once."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[Callable[[], memoryview]]]


def read(folder: Path) -> dict[str, Stored]:
    """The tensors of a model's folder, in the order of its files. Raises UserError if it has none, or damaged ones."""
    index = manifest.read_json(folder / INDEX)
    where = index["weight_map"] if index else None
    files = sorted({folder / name for name in where.values()}) if where else _files(folder)
    found: dict[str, list[tuple[str, Piece]]] = {}
    for file in files:
        for name, dtype, piece in _pieces(file):
            if not where or where.get(name) == file.name:
                found.setdefault(name, []).append((dtype, piece))
    return {name: _stored(name, parts) for name, parts in found.items()}


def _files(folder: Path) -> list[Path]:
    single = [folder / WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else []
    files = single or sorted(folder.glob(_SHARDED))
    if not files:
        pickles = "only *.bin files, which are pickles that can run code" if any(folder.glob("*.bin")) else "no weights"
        raise UserError(
            f"{folder} holds {pickles}; Manta reads safetensors. Use a revision of the model with "
            "*.safetensors, or save it anew with save_pretrained."
        )
    return files


def as_is(stored: Stored) -> Planned:
    """The tensor with the bytes that it has."""

    def chunks() -> Iterator[Callable[[], memoryview]]:
        (piece,) = stored.pieces
        for done in range(0, piece.nbytes, _CHUNK):
            yield partial(_bytes, piece.file, piece.start + done, min(_CHUNK, piece.nbytes - done))

    if len(stored.pieces) > 1:
        return of_rows(stored.dtype, stored.shape, stored.rows)
    return Planned(stored.dtype, stored.shape, stored.nbytes, chunks)


def of_rows(
    dtype: str, shape: tuple[int, ...], rows: Callable[[int, int], torch.Tensor], at_once: int | None = None
) -> Planned:
    """A tensor that `rows(first, last)` makes, cast to `dtype`; some 4 MiB of float32 at a time, or `at_once` rows."""
    count = shape[0] if shape else 1
    width = math.prod(shape[1:])
    step = at_once or max(64, _CHUNK // 4 // max(width, 1) // 64 * 64)  # in 64s: matrix kernels take whole blocks

    def make(first: int) -> memoryview:
        made = rows(first, min(first + step, count)).to(DTYPES[dtype]).contiguous()
        return memoryview(made.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def chunks() -> Iterator[Callable[[], memoryview]]:
        return (partial(make, first) for first in range(0, count, step))

    return Planned(dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize, chunks)


def dtype_name(dtype: torch.dtype) -> str:
    """BF16 for torch.bfloat16."""
    return _NAMES[dtype]


def write(folder: Path, tensors: Mapping[str, Planned], max_shard_size: str | int) -> None:
    """Write `model.safetensors`, or several of at most `max_shard_size` (such as 5GB) with their index.

    A tensor that is larger has a file of its own. Raises UserError if the size is none.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda planned: planned.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(f"--max_shard_size {max_shard_size} is no size. Write it as 5GB or 500MB.") from error
    for file, names in split.filename_to_tensors.items():
        _write(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        manifest.write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write(path: Path, tensors: dict[str, Planned]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide elements first, so that each tensor begins at a multiple of its own element's size.
    order = sorted(tensors, key=lambda name: -tensors[name].nbytes // max(math.prod(tensors[name].shape), 1))
    for name in order:
        each = tensors[name]
        header[name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": (end, end + each.nbytes)}
        end += each.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, _makers() as makers:
        file.write(struct.pack("<Q", len(text)) + text)
        waiting: deque[Future[memoryview]] = deque()
        for chunk in chain.from_iterable(tensors[name].chunks() for name in order):
            waiting.append(makers.submit(chunk))
            if len(waiting) > _MAKERS:
                file.write(waiting.popleft().result())
        for left in waiting:
            file.write(left.result())
        if file.tell() != 8 + len(text) + end:
            raise AssertionError(f"{path} has other bytes than its header says")


@contextmanager
def _makers() -> Iterator[Executor]:
    """Threads that compute with one core each: chunks are too small to be divided further."""
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(_MAKERS, initializer=torch.set_num_threads, initargs=(1,)) as makers:
        try:
            yield makers
        finally:
            torch.set_num_threads(cores)


def _pieces(file: Path) -> Iterator[tuple[str, str, Piece]]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        size = file.stat().st_size
        sharding = json.loads(header.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
        for name, about in header.items():
            start, end = about["data_offsets"]
            if 8 + length + end > size:
                raise ValueError("it is cut off")
            shape = tuple(about["shape"])
            corner = tuple(sharding.get(name, {}).get("saved_offsets", (0,) * len(shape)))
            yield name, about["dtype"], Piece(file, 8 + length + start, end - start, corner, shape)
    except (OSError, ValueError, KeyError, MemoryError, struct.error) as error:
        raise UserError(f"{file} is damaged or missing ({error}). Get the model again.") from error


def _stored(name: str, parts: list[tuple[str, Piece]]) -> Stored:
    pieces = tuple(piece for _, piece in parts)
    ends = [[c + n for c, n in zip(piece.corner, piece.shape, strict=True)] for piece in pieces]
    shape = tuple(max(end) for end in zip(*ends, strict=True))
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        raise UserError(f"{pieces[0].file.parent} does not hold all of {name}: a file is missing, or is there twice.")
    return Stored(name, parts[0][0], shape, pieces)


def _rows(piece: Piece, dtype: str, first: int, last: int) -> torch.Tensor:
    """Those of the rows that `piece` has."""
    if not piece.shape:
        return _tensor(piece, dtype, 0, 1, ())
    low, high = (min(max(row - piece.corner[0], 0), piece.shape[0]) for row in (first, last))
    return _tensor(piece, dtype, low, high, piece.shape[1:])


def _tensor(piece: Piece, dtype: str, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
    width = math.prod(shape) * DTYPES[dtype].itemsize
    if width == 0 or low == high:
        return torch.empty((high - low, *shape), dtype=DTYPES[dtype])
    content = _bytes(piece.file, piece.start + low * width, (high - low) * width)
    flat = torch.frombuffer(content, dtype=DTYPES[dtype])
    return flat.reshape((high - low, *shape) if piece.shape else ())


def _bytes(file: Path, start: int, count: int) -> memoryview:
    content = memoryview(np.empty(count, np.uint8))  # type: ignore[arg-type]
    view = content
    descriptor = os.open(file, os.O_RDONLY)
    try:
        while view:
            got = os.preadv(descriptor, [view], start)
            if got == 0:
                raise OSError(f"{file} ended early")
            view, start = view[got:], start + got
    finally:
        os.close(descriptor)
    return content
