"""Where folders are: on this machine, or on an object store that fsspec knows, such as `s3://bucket/runs`.

Local folders are paths of pathlib, remote ones of universal_pathlib, which have the same methods; the annotation is
`Path` for both. What needs real files (memory maps, torch, TensorBoard, logs) works in this node's cache, which mirrors
the store: `near` says where. A remote folder is closed like a local one: its manifest comes last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from manta import manifest
from manta.errors import UserError

CACHE = "MANTA_CACHE"
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


class DamagedError(OSError):
    """A folder that is not as its manifest says."""


def is_remote(place: str | Path) -> bool:
    """Whether a path or its name is on an object store."""
    return "://" in place if isinstance(place, str) else not isinstance(place, Path)


def place(name: str | Path) -> Path:
    """The folder or file of that name: absolute, or on the store of its URL. Raises UserError for unknown stores."""
    if not isinstance(name, str):
        return name if is_remote(name) else name.expanduser().absolute()
    if not is_remote(name):
        return Path(name).expanduser().absolute()
    from upath import UPath

    try:
        path = UPath(name.rstrip("/"), use_listings_cache=False)  # a listing of before would hide others' files
        cast(Any, path.fs)  # made here, so that a missing package shows here
    except ImportError as error:
        package = _PACKAGES.get(name.split("://")[0], "the package it names")
        raise UserError(f"{name} needs {package} ({error}). Install it: pip install {package}") from error
    except ValueError as error:
        raise UserError(f"{name} is on no store that fsspec knows ({error}). Use a local folder, or s3://….") from error
    return cast(Path, path)


def cache() -> Path:
    """This node's folder for copies of remote folders and for what is written bit by bit: MANTA_CACHE."""
    return Path(os.environ.get(CACHE) or "~/.cache/manta").expanduser().absolute()


def near(folder: Path) -> Path:
    """Where files of `folder` are on this node: there, or in the cache under the same names."""
    remote = cast(Any, folder)
    return cache() / remote.protocol / remote.path.strip("/") if is_remote(folder) else folder


def make_folder(folder: Path) -> None:
    """With its parents; stores have no folders to make."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Delete a folder with all it holds, whether or not it is there. Its manifest goes first, so that it is never
    taken for a whole one.
    """
    (folder / manifest.NAME).unlink(missing_ok=True)
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            _store(folder).rm(cast(Any, folder).path, recursive=True)


def move(folder: Path, target: Path) -> None:
    """Rename a folder; on a store, its files are copied and deleted. What is at `target` is replaced."""
    remove(target)
    if is_remote(folder):
        files = _store(folder).find(cast(Any, folder).path)
        names = [file.removeprefix(_key(folder, "")) for file in files]
        _store(folder).copy(files, [_key(target, name) for name in names])
        remove(folder)
    else:
        folder.rename(target)


def create(path: Path, text: str) -> bool:
    """Write a remote file that must not be there yet; False if it is. Of several at once, one succeeds."""
    try:
        _store(path).pipe_file(cast(Any, path).path, text.encode(), mode="create")
    except FileExistsError:
        return False
    return True


def upload(local: Path, remote: Path, names: Iterable[str]) -> None:
    """Copy files of the folder `local` to `remote`. Raises OSError, whatever the store's client calls it."""
    names = list(names)
    with _as_os_errors(f"upload to {remote}"):
        _store(remote).put([str(local / name) for name in names], [_key(remote, name) for name in names])


def staging(folder: Path, rank: int) -> Path:
    """Where one rank writes its part of `folder`: there, or in a folder of its own on this node if it is remote."""
    return near(folder).with_name(f".staging-{folder.name}-{rank:05d}") if is_remote(folder) else folder


def publish(local: Path, remote: Path) -> None:
    """Replace the folder `remote` by the closed folder `local`, its manifest last. Raises OSError."""
    about = manifest.read(local) or {"files": {}}
    with _as_os_errors(f"replace {remote}"):
        remove(remote)
    upload(local, remote, about["files"])
    upload(local, remote, [manifest.NAME])


def fetch(folder: Path) -> Path:
    """`folder`, or a whole copy of it on this node, fetched once per node and verified by hash.

    Raises DamagedError if the folder is unfinished or not as its manifest says, and OSError if the store fails.
    """
    if not is_remote(folder):
        return folder
    with _as_os_errors(f"read {folder}"):
        about, found = manifest.read(folder), manifest.damage(folder, content=False)
    if about is None or found:
        raise DamagedError(found)
    from filelock import FileLock

    here = near(folder)
    here.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(here.with_name(f".lock-{here.name}")):
        if manifest.read(here) != about or manifest.damage(here, content=False):
            _fetch(folder, here, about)
    return here


def problem(folder: Path) -> str | None:
    """What is wrong with a closed folder, every byte compared, or None; a remote one is fetched for it."""
    if not is_remote(folder):
        return manifest.damage(folder)
    try:
        fetch(folder)
    except DamagedError as error:
        return str(error)
    return None


def forget_others(folder: Path, pattern: str) -> None:
    """Of the copies on this node beside that of the remote `folder`, remove those that match `pattern`."""
    here = near(folder)
    for copy in here.parent.glob(pattern) if is_remote(folder) else ():
        if copy != here:
            remove(copy)


def arrow(path: Path) -> tuple[str, Any]:
    """(path, file system) as Ray wants them; None for a local one, which Ray knows by itself."""
    if not is_remote(path):
        return str(path), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return cast(Any, path).path, PyFileSystem(FSSpecHandler(_store(path)))


def check(name: str, setting: str = "results_dir") -> None:
    """Write, read and delete a small file in `name`, before anything is loaded. Raises UserError if that fails."""
    folder = place(name)
    if not is_remote(folder):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UserError(
                f"{setting} {name} cannot be written: {there} is read-only or no folder. Set another --{setting}."
            )
        return
    token = uuid.uuid4().hex
    probe = folder / f".manta-{token}"
    try:
        probe.write_text(token, encoding="utf-8")
        read = probe.read_text(encoding="utf-8")
        probe.unlink()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} cannot be written, read and deleted from ({reason}). Check that its bucket exists, and your "
            "credentials: the environment's (AWS_PROFILE, AWS_ENDPOINT_URL, …) or the machine's role."
        ) from error
    if read != token:
        raise UserError(f"{name} does not give back what was written there. Set another --{setting}.")


def _fetch(folder: Path, here: Path, about: dict[str, Any]) -> None:
    partial = here.with_name(f".partial-{here.name}")
    shutil.rmtree(partial, ignore_errors=True)
    names = list(about["files"])
    for parent in {(partial / name).parent for name in (*names, manifest.NAME)}:
        parent.mkdir(parents=True, exist_ok=True)
    try:
        with _as_os_errors(f"read {folder}"):
            _store(folder).get([_key(folder, name) for name in names], [str(partial / name) for name in names])
    except FileNotFoundError as error:
        raise DamagedError(f"a file of {folder} is missing: {error}") from error
    manifest.write_json(partial / manifest.NAME, about)
    if found := manifest.damage(partial):
        shutil.rmtree(partial)
        raise DamagedError(found)
    remove(here)
    partial.rename(here)


@contextlib.contextmanager
def _as_os_errors(doing: str) -> Iterator[None]:
    """Errors of a store's client are OSErrors outside, which those who retry know."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"cannot {doing}: {type(error).__name__}: {error}") from error


def _store(path: Path) -> Any:
    return cast(Any, path).fs


def _key(folder: Path, name: str) -> str:
    return f"{cast(Any, folder).path.rstrip('/')}/{name}"
