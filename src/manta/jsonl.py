"""Lines of JSON that are added to a file and read as they come, on a disk or on an object store."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from manta import manifest
from manta.storage import is_remote

REWRITE_S = 5.0
_REWRITTEN_PER_S = 1 << 20  # bytes of a remote file


class JsonLines:
    """Lines added to a file. What cannot be written now, on a full disk or a failing store, is kept for the next time.

    A store has no appending: there the file is written anew, every REWRITE_S and the less often the longer it is.
    """

    _opened: ClassVar[dict[str, JsonLines]] = {}  # so that nobody else rewrites what one holds in memory

    def __init__(self, path: Path):
        self.path = path
        self._lines: list[str] = []
        self._written: str | None = None  # of a remote file
        self._due = 0.0
        self._problem: str | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        self._opened[str(self.path)] = self

    def close(self) -> None:
        self.flush(now=True)
        self._opened.pop(str(self.path), None)

    def add(self, value: dict[str, Any]) -> None:
        with self._lock:
            self._lines.append(json.dumps(value, ensure_ascii=False) + "\n")

    def flush(self, now: bool = False) -> str | None:
        """Write what is due, or all of it `now`; returns what to tell the user, once, if it cannot be written."""
        with self._lock:
            if not self._lines or (not now and time.monotonic() < self._due):
                return None
            try:
                (self._rewrite if is_remote(self.path) else self._append)("".join(self._lines))
            except Exception as error:  # of any client of a store
                self._due = time.monotonic() + REWRITE_S
                told, self._problem = self._problem, f"{self.path} cannot be written just now: {error}"
                return None if told else self._problem
            self._lines, self._problem = [], None
            return None

    def _append(self, text: str) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(text.encode())
                if written < len(text.encode()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)  # half a line would make the file unreadable
                raise

    def _rewrite(self, text: str) -> None:
        if self._written is None:
            try:
                self._written = manifest.read_text(self.path)
            except FileNotFoundError:
                self._written = ""
        whole = self._written + text
        self.path.write_text(whole, encoding="utf-8")
        self._written = whole
        self._due = time.monotonic() + REWRITE_S + len(whole) / _REWRITTEN_PER_S


def append_json(path: Path, value: dict[str, Any]) -> None:
    """Append one line of JSON now, or as soon as it can be written if a monitor has the file open."""
    log = JsonLines._opened.get(str(path)) or JsonLines(path)
    log.add(value)
    log.flush(now=True)


class NewLines:
    """What was added to a file since the last look. Half a line is left for the next one."""

    def __init__(self, path: Path):
        self.path, self._read = path, 0

    def read(self) -> list[dict[str, Any]]:
        """Whole lines, oldest first; none while there is no file."""
        try:
            if is_remote(self.path):
                added = manifest.read_text(self.path).encode()[self._read :]
            else:
                with self.path.open("rb") as file:
                    file.seek(self._read)
                    added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
