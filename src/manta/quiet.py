"""What libraries say by themselves: kept from the terminal, where one display stands for all, and written to the run's
logs. `--verbose`, or MANTA_VERBOSE=1, shows it."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from rich.console import Console

from manta import storage

VARIABLE = "MANTA_VERBOSE"
DRIVER_LOG = "driver.log"
# Read by libraries when they are imported. Set a variable yourself to hear one of them.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_set: set[str] = set()  # those that were ours to set


def is_verbose() -> bool:
    return os.environ.get(VARIABLE, "0") not in ("", "0", "false")


def hush() -> None:
    """Before any library is imported: warnings about their own future, progress bars and notes are off."""
    if is_verbose():
        return
    _set.update(_QUIET.keys() - os.environ.keys())
    os.environ.update({name: _QUIET[name] for name in _set})
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)


def speak_up() -> None:
    """Take back what `hush` did, for this process and those that it starts."""
    os.environ[VARIABLE] = "1"
    for name in _set:
        os.environ.pop(name, None)
    _set.clear()
    warnings.simplefilter("default")


@contextmanager
def captured(logs: Path, console: Console) -> Iterator[None]:
    """While in the block, what this process prints goes to a file in the run's `logs`, but for `console`.

    Ray's own messages about lost workers are among it, which it prints whatever it was told.
    """
    if is_verbose():
        yield
        return
    console.file = console.file  # the stream of now, not the one that is put in its place
    here = storage.near(logs)
    here.mkdir(parents=True, exist_ok=True)
    log = here / DRIVER_LOG
    try:
        with log.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
            yield
    finally:
        if storage.is_remote(logs) and log.stat().st_size:
            with suppress(OSError):  # a log is no reason to fail
                storage.upload(here, logs / socket.gethostname(), [DRIVER_LOG])
