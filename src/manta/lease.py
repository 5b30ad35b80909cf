"""The right to write into a run's folder: one driver has it at a time, and says so in `lease.json`.

On an object store, which can neither rename nor link, leases are numbered (`lease-000003.json`), each created once.

A holder renews its lease every few seconds. A new driver is refused while that goes on, and takes over once the
holder's process is gone from this host, or its lease was not renewed for EXPIRES_S by the storage's own clock. Each
lease has a fencing token (https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html): workers whose
driver lost the lease meanwhile commit no checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from manta import manifest, storage
from manta.errors import HeldError
from manta.runs import Run

NAME = "lease.json"
RENEW_S = 5.0
EXPIRES_S = 60.0


class Lease:
    """Held while in the `with` block. Raises HeldError on entry if another driver has the run."""

    def __init__(self, run: Run):
        self.folder = run.path
        self.path = self.folder / NAME  # on an object store, each lease has a number of its own
        self.token = uuid.uuid4().hex
        self._about = {
            **{"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())},
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="manta-lease", daemon=True)

    def __enter__(self) -> Self:
        storage.make_folder(self.folder)
        if storage.is_remote(self.folder):
            self._take_next()
        else:
            while not self._take():
                self._refuse_or_remove()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if holder_of(self.folder).get("token") == self.token:
            if storage.is_remote(self.folder):  # stays, since nobody may take its number again
                manifest.write_json(self.path, {})
            else:
                self.path.unlink(missing_ok=True)

    def _take(self) -> bool:
        """Put the lease there if there is none: a link is made whole or not at all, on shared storage too."""
        mine = self.path.with_name(f".{NAME}.{self.token}")
        manifest.write_json(mine, self._about)
        try:
            os.link(mine, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: the name at least is taken by one only
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(mine.read_text(encoding="utf-8"))
            except FileExistsError:
                return False
        finally:
            mine.unlink()
        return True

    def _take_next(self) -> None:
        """Take the number after the newest lease, which only one of several contenders can, on any object store.

        Who has the highest number has the run. Lower ones are deleted, so that a slow contender may get one of these.
        """
        while True:
            newest = _file(self.folder)
            _refuse_if_held(newest)
            self.path = self.folder / f"lease-{int(newest.stem.rpartition('-')[2]) + 1:06d}.json"
            if not storage.create(self.path, json.dumps(self._about)):
                continue
            if _file(self.folder) != self.path:
                self.path.unlink(missing_ok=True)
                continue
            for file in self.folder.glob("lease-*.json"):
                if file.name < self.path.name:
                    file.unlink(missing_ok=True)
            return

    def _refuse_or_remove(self) -> None:
        """Raise if the holder lives; else put its lease aside, which only one of several contenders can."""
        holder = holder_of(self.folder)
        refuse_if_held(self.folder)
        aside = self.path.with_name(f".{NAME}.{self.token}.old")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if (manifest.read_json(aside) or {}).get("token") != holder.get("token"):  # somebody was quicker: give it back
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            with contextlib.suppress(Exception):  # of any client of a store: the next renewal may succeed
                if holder_of(self.folder).get("token") != self.token:
                    continue
                if storage.is_remote(self.folder):
                    manifest.write_json(self.path, self._about)
                else:
                    self.path.touch()


def holder_of(folder: Path) -> dict[str, Any]:
    """Who holds the run in `folder`: token, host, pid, since; empty if nobody does."""
    return manifest.read_json(_file(folder)) or {}


def is_held(folder: Path) -> bool:
    """Whether a living driver has the run in `folder`."""
    return _is_held(_file(folder))


def refuse_if_held(folder: Path) -> None:
    """Raises HeldError if a living driver has the run in `folder`."""
    _refuse_if_held(_file(folder))


def _refuse_if_held(file: Path) -> None:
    if _is_held(file):
        holder = manifest.read_json(file) or {}
        where = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
        raise HeldError(
            f"Another driver is training {file.parent}: {where}. Wait for it, or end it; --run_name gives this one a "
            "run of its own."
        )


def loss(folder: Path, token: str | None) -> str | None:
    """What to say if the run is held with another token than `token`, or None; without a token, nothing is held."""
    holder = holder_of(folder)
    if token is None or holder.get("token") == token:
        return None
    by = f"process {holder.get('pid')} on {holder.get('host')} has it" if holder else "nobody has it now"
    return f"The lease of {folder} is lost ({by}), so this driver's workers write no more checkpoints there."


def _file(folder: Path) -> Path:
    """The newest lease, or where the first one would be."""
    if not storage.is_remote(folder):
        return folder / NAME
    return max(folder.glob("lease-*.json"), default=folder / "lease-000000.json")


def _is_held(file: Path) -> bool:
    holder = manifest.read_json(file) or {}
    released = storage.is_remote(file) and not holder
    return not released and file.exists() and _is_alive(file, holder)


def _is_alive(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname() and Path("/proc/self").exists():
        return _born(int(holder.get("pid", 0))) == holder.get("born") is not None
    try:
        return _now(path) - path.stat().st_mtime < EXPIRES_S
    except FileNotFoundError:
        return False


def _now(path: Path) -> float:
    """The clock of the storage; our own where we may only read, as one who watches a run may."""
    probe = path.with_name(f".{NAME}.now-{uuid.uuid4().hex}")
    try:
        probe.write_text("")
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return time.time()
        raise
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _born(pid: int) -> str | None:
    """When a process of this host started, in clock ticks, which tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return None
