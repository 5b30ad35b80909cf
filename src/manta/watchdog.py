"""Ends a worker that makes no progress, with the stacks of all its threads in its log.

A deadlocked loop is not seen by Ray: it runs in a thread of its own, and health checks are answered by another. A hang
in a collective stops all ranks, so that every rank's watchdog fires and every log has its stacks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import Any

from transformers import TrainerCallback

_ENDED_BY_WATCHDOG = 70  # exit code: "internal error", as sysexits.h has it
_ANSWER_S = 5


class Watchdog:
    """Runs while in the `with` block: no `progress()` for `timeout_s` seconds ends the process; 0: never."""

    def __init__(self, timeout_s: float, mailbox: Any, rank: int):
        self.timeout_s, self.mailbox, self.rank = timeout_s, mailbox, rank
        self.last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="manta-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.timeout_s:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.timeout_s:
            self._stop.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        self.last = time.monotonic()

    def _watch(self) -> None:
        every = min(self.timeout_s / 4, 10)
        while not self._stop.wait(every):
            silent = time.monotonic() - self.last
            if silent > self.timeout_s:
                self._end(silent)
            # In C, for a thread that holds the interpreter's lock, which keeps this one from running.
            faulthandler.dump_traceback_later(self.timeout_s + 2 * every, exit=True)

    def _end(self, silent: float) -> None:
        print(f"manta: no progress for {silent:.0f} s; the stacks of all threads follow", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        log = f"logs/worker-{self.rank:05d}.log"
        text = f"rank {self.rank} made no progress for {silent:.0f} s (--step_timeout_s); stacks are in {log}"
        if self.mailbox is not None:
            import ray

            try:
                ray.get(self.mailbox.report.remote("hang", text), timeout=_ANSWER_S)
            except Exception as error:  # whatever it is, this process has to end
                print(f"manta: the driver was not told: {error}", file=sys.stderr, flush=True)
        os._exit(_ENDED_BY_WATCHDOG)


class ProgressOfLoop(TrainerCallback):
    """What counts as progress: a micro-batch, a step, a batch of an evaluation, an evaluation, a save."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog = watchdog

    def _progress(self, *args: Any, **kwargs: Any) -> None:
        self.watchdog.progress()

    on_train_begin = on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_save = (
        _progress
    )
