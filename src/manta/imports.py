"""Large libraries, imported sooner, and left sooner."""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# What a training worker imports, but for Ray, which must be imported where its environment is known.
OF_WORKERS = (
    "datasets",
    "google.protobuf.message",
    "pandas",
    "peft",
    "pydantic",
    "rich.console",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.trainer",
)


@contextmanager
def quickly() -> Iterator[None]:
    """Import inside: without the garbage collector, which looks again and again through modules that are being made.

    It takes a fifth of the time that torch, transformers and PEFT take, and finds next to nothing. What was imported
    stays for good, and no later collection looks through it: https://docs.python.org/3/library/gc.html#gc.freeze
    """
    enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if enabled:
            gc.enable()


def ahead(*more: str) -> None:
    """Import what a training worker will, and `more`."""
    with quickly():
        for name in (*OF_WORKERS, *more):
            importlib.import_module(name)


@contextmanager
def beside(name: str) -> Iterator[None]:
    """Import `name` while the block waits for other processes; what goes wrong is told where it is imported next."""

    def load() -> None:
        with suppress(Exception):
            importlib.import_module(name)

    thread = threading.Thread(target=load, name=f"import {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def leave_quickly() -> None:
    """At its end the process does not look for garbage either, which takes two seconds after such imports."""
    atexit.register(gc.freeze)
