"""Large libraries, imported sooner."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quickly() -> Iterator[None]:
    """Import inside: without the garbage collector, which looks again and again through modules that are being made.

    It takes a fifth of the time that torch, transformers and PEFT take, and finds next to nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
