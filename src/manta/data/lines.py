"""Rows as lines of JSON: read by byte ranges, and written out as such from what has no lines of its own."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from manta.errors import UserError

# Where shards end depends on the files alone, never on the number of CPUs: results are the same everywhere.
SHARD_ROWS = 4096
SHARD_BYTES = 32 << 20  # bounds a task's memory where rows are long
MAX_ROW_BYTES = 16 << 20  # a row is tokenized whole, which can take two hundred times its size

_BLOCK = 16 << 20
_BOM = b"\xef\xbb\xbf"
_LINES, _ROWS = ".lines", ".rows"  # of a copy: the lines of a compressed file, or rows that had no line each
_SPACE = re.compile(r"[ \t\n\r]*")
_BAD = "__not_a_row__"  # key of a line that stands for a row which could not be written out


class BadRow(ValueError):  # noqa: N818 (it is handed on as a value, too)
    """A row that cannot be used. The message is the reason, as the quarantine file and the counts give it."""


@dataclass(frozen=True)
class Shard:
    file: int
    offset: int  # bytes
    first: int  # row of the whole source
    rows: int


@dataclass(frozen=True)
class Lines:
    """Files of JSON lines. `names` are the files as the user knows them."""

    files: tuple[Path, ...]
    names: tuple[str, ...]
    parts: tuple[Shard, ...]

    @property
    def shards(self) -> list[int]:
        return [shard.rows for shard in self.parts]

    def read(self, shard: int) -> Iterator[Mapping[str, Any] | BadRow | None]:
        part = self.parts[shard]
        with self.files[part.file].open("rb") as file:
            file.seek(part.offset)
            for _ in range(part.rows):
                yield _parse(_line(file))

    def where(self, row: int) -> str:
        part = self.parts[bisect_right(self.parts, row, key=lambda shard: shard.first) - 1]
        first = next(shard.first for shard in self.parts if shard.file == part.file)
        # What is no file of lines itself was written out row by row: its lines are others.
        unit = "row" if self.files[part.file].suffix == _ROWS else "line"
        return f"{self.names[part.file]}, {unit} {row - first + 1}"


def open_files(files: Sequence[Path], cache_dir: Path, names: Mapping[Path, str]) -> Lines:
    """Text files as lines; what has none is written to `cache_dir`. `names` are those of files that are copies.

    Raises UserError on a file that is broken whole.
    """
    plain: list[Path] = []
    parts: list[Shard] = []
    rows = 0
    for number, file in enumerate(files):
        plain.append(_as_lines(file, cache_dir / f"{number:05d}"))
        for offset, count in _divide(plain[-1]):
            parts.append(Shard(number, offset, rows, count))
            rows += count
    return Lines(tuple(plain), tuple(names.get(file, str(file)) for file in files), tuple(parts))


def remote_identity(url: str, kinds: Sequence[str]) -> dict[str, str]:
    """Name → the storage's own tag (ETag, checksum, or size and time) of each file that a URL means."""
    filesystem, _, files = _remote(url, kinds)
    try:
        return {file: _tag(filesystem, file) for file in files}
    except Exception as error:
        raise _cannot_fetch(url, error) from error


def download(url: str, kinds: Sequence[str], folder: Path) -> dict[Path, str]:
    """Copy the files that a URL means into `folder`, as streams: copy → URL. Raises UserError if that fails."""
    filesystem, root, files = _remote(url, kinds)
    folder.mkdir(parents=True, exist_ok=True)
    copies = {}
    for number, file in enumerate(files):
        # Flat, with the names of folders below the URL, which may tell the split.
        name = file.split("?")[0].removeprefix(root).strip("/").replace("/", "-")
        copy = folder / f"{number:05d}-{name}"
        try:
            with filesystem.open(file, "rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except Exception as error:
            raise _cannot_fetch(url, error) from error
        copies[copy] = filesystem.unstrip_protocol(file)
    return copies


def _remote(url: str, kinds: Sequence[str]) -> tuple[Any, str, list[str]]:
    """(file system, folder of the files, files) that a URL means. Raises UserError if there is none."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.invalidate_cache()  # listings are kept for the life of a process
        is_folder = not any(path.split("?")[0].removesuffix(".gz").endswith(kind) for kind in kinds)
        found = filesystem.find(path) if is_folder else [path] if filesystem.exists(path) else []
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(url.split("://")[0], "the package it names")
        raise UserError(f"{url} needs {package} ({error}). Install it: pip install {package}") from error
    except Exception as error:
        raise _cannot_fetch(url, error) from error
    files = sorted(
        file for file in found if any(file.removesuffix(".gz").endswith(kind) for kind in kinds) or not is_folder
    )
    if not files:
        raise UserError(f"There is nothing to read at {url}. Check --hfdc_dataset_name.")
    return filesystem, path if is_folder else path.split("?")[0].rpartition("/")[0], files


def _tag(filesystem: Any, file: str) -> str:
    """What changes with the file. Of a web server, what it says: fsspec takes files there for unchanging."""
    if not file.startswith(("http://", "https://")):
        return str(filesystem.ukey(file))
    about = filesystem.info(file)
    return json.dumps([about.get(name) for name in ("ETag", "Content-MD5", "Digest", "Last-Modified", "size")])


def _cannot_fetch(url: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"{url} cannot be read ({reason}). Check --hfdc_dataset_name and your credentials.")


def _line(file: BinaryIO) -> bytes | BadRow:
    line = file.readline(MAX_ROW_BYTES + 1)
    if len(line) <= MAX_ROW_BYTES:
        return line
    while line and not line.endswith(b"\n"):
        line = file.readline(_BLOCK)
    return BadRow(f"longer than {MAX_ROW_BYTES >> 20} MiB")


def _parse(line: bytes | BadRow) -> Mapping[str, Any] | BadRow | None:
    if isinstance(line, BadRow):
        return line
    line = line.removeprefix(_BOM).strip()
    if not line:
        return None
    try:
        row = json.loads(line.decode())
        if b"\\u" in line or b"\\U" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return BadRow("not valid UTF-8")
    except UnicodeEncodeError:
        return BadRow("half of a surrogate pair, which is no character")
    except RecursionError:
        return BadRow("nested too deeply")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg}")
    except ValueError as error:  # a number of thousands of digits
        return BadRow(f"not JSON: {error}")
    if not isinstance(row, dict):
        kind = {list: "an array", str: "a text", type(None): "null"}.get(type(row), "a number or a truth value")
        return BadRow(f"{kind} where an object is expected")
    return BadRow(row[_BAD]) if _BAD in row else row


def _divide(file: Path) -> Iterator[tuple[int, int]]:
    """(offset, lines) of each shard of a file, read once in blocks."""
    start = lines = position = 0
    ended = True  # whether the last line has its newline
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (position + 1)
            position += len(block)
            ended = block.endswith(b"\n")
            used = 0
            while True:
                full = min(used + SHARD_ROWS - lines - 1, int(np.searchsorted(ends, start + SHARD_BYTES)))
                full = max(full, used)
                if full >= len(ends):
                    lines += len(ends) - used
                    break
                yield start, lines + full + 1 - used
                start, lines, used = int(ends[full]), 0, full + 1
    if rest := lines + (not ended):
        yield start, rest


def _as_lines(file: Path, target: Path) -> Path:
    """`file` itself if it has a row a line, else the copy `target` that has. Raises UserError if it is broken whole."""
    try:
        name = file.name.removesuffix(".gz")
        with _opened(file) as stream:
            start = stream.read(4096)
        _check_encoding(file, start)
        write: Callable[[Path], Iterator[Any]] = _plain_lines
        if name.endswith(".csv"):
            write = _csv_rows
        elif start.removeprefix(_BOM).lstrip()[:1] == b"[":
            write = _array_rows
        elif name.endswith(".json"):
            _check_lines(file)
        if write is _plain_lines and name == file.name:
            return file
        target = target.with_suffix(_LINES if write is _plain_lines else _ROWS)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as lines:
            for row in write(file):
                lines.write(row if isinstance(row, bytes) else _as_line(row))
        return target
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} cannot be read: it is cut off or damaged ({error}). Get it again.") from error


def _as_line(row: Any) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        bad = {_BAD: "not valid UTF-8, or half of a surrogate pair"}
    except RecursionError:
        bad = {_BAD: "nested too deeply"}
    return json.dumps(bad).encode() + b"\n"


def _opened(file: Path) -> Any:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")


def _plain_lines(file: Path) -> Iterator[bytes]:
    with _opened(file) as stream:
        while block := stream.read(1 << 20):
            yield block


def _csv_rows(file: Path) -> Iterator[Any]:
    """Rows of a CSV file as they are written: every value is text. A row of another width stands as bad."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _opened(file) as stream:
        # What is not UTF-8 becomes half surrogates, which are found when their row is written.
        text = (line.decode("utf-8", "surrogateescape") for line in stream)
        reader = csv.reader((line.removeprefix("\ufeff") for line in text), strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(f"{file} names a column twice: {header}. Rename one.")
            for values in reader:
                if values and len(values) != len(header):
                    yield {_BAD: f"{len(values)} values under {len(header)} columns"}
                else:
                    yield dict(zip(header, values, strict=True)) if values else b"\n"
        except csv.Error as error:
            raise UserError(
                f"{file} cannot be read: {error}, in what begins before line {reader.line_num + 1}. Is a quote open?"
            ) from error


def _array_rows(file: Path) -> Iterator[Any]:
    """Elements of a JSON array, as a stream: each is read as it would be on a line of its own."""
    decoder = json.JSONDecoder()
    elements = at = 0
    with _opened(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as source:
        text = source.read(1 << 20).lstrip()[1:]
        separator = more = ","
        while separator == ",":
            start = _skip_space(text, at)
            if elements == 0 and text[start : start + 1] == "]":
                at, separator = start + 1, "]"
                break
            try:
                row, end = decoder.raw_decode(text, start)
                end = _skip_space(text, end)
                separator = text[end]
                if separator not in ",]":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            except (ValueError, IndexError, RecursionError) as error:
                if not more or len(text) - at > MAX_ROW_BYTES:
                    raise _broken_array(file, elements, text, error, bool(more)) from error
                more = source.read(max(1 << 20, len(text) - at))  # at least twice as much: no element is read often
                text, at, separator = text[at:] + more, 0, ","
                continue
            elements += 1
            at = end + 1
            yield row
        text = text[at:]
        while text:
            if text.strip():
                raise _broken_array(file, elements, "", ValueError(f"{text.strip()[:20]!r} follows its end"), False)
            text = source.read(1 << 20)


def _skip_space(text: str, at: int) -> int:
    return cast(re.Match[str], _SPACE.match(text, at)).end()


def _broken_array(file: Path, elements: int, text: str, error: Exception, goes_on: bool) -> UserError:
    reason = str(error)
    if isinstance(error, RecursionError):
        reason = "one is nested too deeply"
    elif isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg.removesuffix(' at')} at {text[error.pos :][:20]!r}"
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            error = IndexError()
    if isinstance(error, IndexError):
        reason = f"one has no end in {MAX_ROW_BYTES >> 20} MiB" if goes_on else "it is cut off"
    return UserError(
        f"{file} cannot be read as a JSON array: after {elements:,} element{'s' * (elements != 1)}, {reason}. It must "
        "hold one array of objects, or one object per line."
    )


def _check_encoding(file: Path, start: bytes) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file} cannot be read: it is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8.")
    if b"\0" in start:
        raise UserError(f"{file} cannot be read: it is not text. Check --hfdc_dataset_name.")


def _check_lines(file: Path) -> None:
    """Raises UserError if a .json file holds one object over several lines, which is no list of rows."""
    with _opened(file) as stream:
        first = next((line for line in stream if line.strip()), b"")
    row = _parse(first)
    if isinstance(row, BadRow) and len(first.strip()) < 3:
        raise UserError(
            f"{file} cannot be read: it holds one JSON object over several lines. It must hold one array of objects, "
            "or one object per line."
        )
