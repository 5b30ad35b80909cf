"""Versions of the libraries that shape weights: what a run and a converted folder say of themselves."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("manta-train", "transformers", "peft", "torch", "safetensors", "ray")


def versions() -> dict[str, str]:
    """`{library: version}` of those that are installed where this is called."""
    return {name: number for name in _LIBRARIES if (number := _version(name))}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # on a path instead of installed
        return None
