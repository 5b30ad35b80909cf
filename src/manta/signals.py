"""What the driver does with SIGTERM and SIGINT while a run is under way. Only the main thread can hear them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stopping_on_sigterm(wanted: threading.Event) -> Iterator[None]:
    """The first SIGTERM asks the workers to save and leave; a second one ends the driver as before.

    Set after Ray's start, which installs a handler of its own. Ray Train's handler of SIGINT, which it leaves behind,
    is taken away at the end: in a notebook or a longer program it would end the process at the next Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        wanted.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, ask)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, on_interrupt)


def was_interrupted(error: BaseException) -> bool:
    """Whether `error`, which ended Ray Train, stands for a SIGINT: its handler exits, or lets the controller exit."""
    on_purpose = (
        "exit_actor() is called",
        "exits by an user request",
    )  # Ray's words for a controller that ended itself
    return isinstance(error, KeyboardInterrupt | SystemExit) or any(words in str(error) for words in on_purpose)
