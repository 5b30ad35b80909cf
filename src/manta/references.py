"""Secrets by reference: `env:NAME` is what the variable NAME holds when it is needed, so that settings can be written
down. What looks like a secret itself is refused."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from urllib.parse import urlsplit

from manta.errors import UserError

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)
_REFERENCE = re.compile(r"env:([A-Za-z_]\w*)")
_TOKEN = re.compile(r"(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[\w-]{20,}")  # such as the last part of a webhook's path
_SHORTEST = 8  # a shorter value, such as `true`, is found in anything


def secret_in(text: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The name of a secret variable whose value is in `text`, or None."""
    for name, value in environ.items():
        if SECRET_NAME.search(name) and len(value) >= _SHORTEST and not value.startswith("/") and value in text:
            return name
    return None


def is_url(target: str) -> bool:
    return target.lower().startswith(("http://", "https://"))


def writable(target: str | None) -> str | None:
    """`target`, a URL or a command, or a reference to one, unless it should not be written into a run's files.

    Raises ValueError.
    """
    if target is None or _REFERENCE.fullmatch(target):
        return target
    if target.startswith("env:"):
        raise ValueError("names no variable; write env:NAME")
    if not is_url(target):
        try:
            words = shlex.split(target)
        except ValueError as error:
            raise ValueError(f"is no command line ({error})") from error
        if not words:
            raise ValueError("is empty; give a URL or a command, or leave it out")
        return target
    url = urlsplit(target)
    if not url.hostname:
        raise ValueError("is a URL without a host")
    if url.username or url.password or url.query or any(map(_TOKEN.fullmatch, url.path.split("/"))):
        raise ValueError(
            "is a URL with what looks like a secret, which would be written into the run's files; put it into a "
            "variable, and give env:NAME"
        )
    return target


def resolve(target: str) -> str:
    """What `target` stands for. Raises UserError if its variable is not set, or if it holds a secret itself."""
    if reference := _REFERENCE.fullmatch(target):
        if found := os.environ.get(reference[1], "").strip():
            return found
        raise UserError(f"{target}: the variable {reference[1]} is not set here. Set it, or leave the setting out.")
    if name := secret_in(target):
        raise UserError(f"The value of {name} would be written down. Put all of the setting into a variable: env:NAME.")
    return target
