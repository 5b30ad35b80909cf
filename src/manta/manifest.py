"""What closes a folder: a manifest, written last, with the size and SHA-256 of every file.

A folder without a manifest is unfinished, and one whose files do not match it is damaged: neither is ever used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 20

FileDigests = dict[str, dict[str, Any]]


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically: readers see the old text or the new one, also after a power cut."""
    if not isinstance(path, Path):  # on an object store, where a file is there once it is written whole
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """What a text file holds, at one moment: a store is asked once, so that a replacement never comes in between."""
    if isinstance(path, Path):
        return path.read_text(encoding="utf-8")
    remote: Any = path
    return remote.fs.cat_file(remote.path).decode()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds, or None if there is no file or no JSON in it.

    A storage that fails is another matter, and raises: what cannot be read just now is not gone.
    """
    try:
        value = json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, none if there is no file. What is no whole line is left out: a writer was
    killed, or is writing it.
    """
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        return []
    return [value for line in lines if isinstance(value := _json_or_none(line), dict)]


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hex digits over values that JSON can carry."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def digests(folder: Path, names: list[str] | None = None) -> FileDigests:
    """`{relative name: {"size": bytes, "sha256": hex}}` of the files in `folder`, or of those named."""
    if names is None:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    paths = {name: folder / name for name in names if name != NAME}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing gives Python's lock free
        hashes = threads.map(sha256, paths.values())
        return {
            name: {"size": path.stat().st_size, "sha256": digest}
            for (name, path), digest in zip(paths.items(), hashes, strict=True)
        }


def close(folder: Path, files: FileDigests, about: Mapping[str, Any]) -> None:
    """Write the manifest: from now on `folder` is complete."""
    write_json(folder / NAME, {"format": FORMAT, **about, "files": files})


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None if it is unfinished or its manifest is unreadable."""
    manifest = read_json(folder / NAME)
    known = manifest is not None and manifest.get("format") == FORMAT and isinstance(manifest.get("files"), dict)
    return manifest if known else None


def damage(folder: Path, content: bool = True) -> str | None:
    """What is wrong with `folder`, or None if every file is as it was written.

    Sizes are always compared; `content=False` leaves out the hashes, which read every byte.
    """
    manifest = read(folder)
    if manifest is None:
        return "it has no readable manifest"
    sizes = _sizes(folder, manifest["files"])
    for name, expected in manifest["files"].items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["size"]:
            return f"{name} has {sizes[name]} bytes instead of {expected['size']}"
        if content and sha256(folder / name) != expected["sha256"]:
            return f"{name} does not match its SHA-256"
    return None


def _sizes(folder: Any, names: Iterable[str]) -> dict[str, int]:
    """Bytes of each file that is there; on an object store by one listing, not a question for each."""
    if isinstance(folder, Path):
        return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    found = folder.fs.find(folder.path, detail=True)
    return {name.removeprefix(f"{folder.path}/"): about["size"] for name, about in found.items()}
