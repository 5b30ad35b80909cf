"""When and in which thread a checkpoint is written: one at a time, beside training, tried again if storage fails.

Between two optimizer steps what is trained stands still. So a save in the background first copies it to host memory,
while the next step computes; only the next optimizer step waits for that copy (`wait_copied`). At most one copy exists,
since a save waits for the one before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from manta import checkpoint, lease, ledger
from manta.errors import StorageError, UserError
from manta.runs import Run

# Seconds before each new try: a full disk or a storage that is away for a minute costs no run.
TRIES_AFTER_S = (1.0, 4.0, 16.0, 64.0)
REFUSED_IN_A_ROW = 2


class Saver:
    """Writes the checkpoints of `run`. Collective: all ranks make one, and call the same methods in the same order.

    A save that storage refuses in all tries costs that checkpoint, not the run: the next one tries anew. Two in a row,
    or the last one of the run, are raised, on all ranks at the same step.

    Attributes: `committed` is the step of the last complete checkpoint, `stall_s` the seconds for which the last save
    kept training waiting.
    """

    def __init__(self, run: Run, committed: int, token: str | None, in_background: bool, note: Callable[[str], None]):
        self.run, self.committed, self.token, self.note = run, committed, token, note
        self.stall_s = 0.0
        self.group = background_group()
        self._pool = ThreadPoolExecutor(1, "manta-save") if in_background else None
        self._running: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._problem: Exception | None = None
        self._refused = 0  # saves in a row

    def save(
        self, folder: Path, taken: checkpoint.Snapshot, entries: list[ledger.Entry], about: dict[str, Any]
    ) -> None:
        """Write `taken` as the checkpoint `folder`, and `entries`, which this rank consumed since the last one.

        Raises what ended an earlier save.
        """
        start = time.perf_counter()
        self._join()
        if isinstance(self._problem, StorageError) and self._refused < REFUSED_IN_A_ROW:
            self._problem = None
        if self._problem:
            raise self._problem
        self._copied.clear()
        ready = mark()

        def work() -> None:
            try:
                with beside_compute(ready):
                    taken.copy()
            finally:
                self._copied.set()
            self._write(folder, taken, entries, about)

        self._submit(work)
        self.stall_s = time.perf_counter() - start

    def then(self, act: Callable[[], None]) -> None:
        """Call `act` once the running save is complete, in its thread, after what was asked for before."""
        self._submit(act)

    def wait_copied(self) -> None:
        """Call before what is trained changes."""
        if not self._copied.is_set():
            start = time.perf_counter()
            self._copied.wait()
            self.stall_s += time.perf_counter() - start

    def wait(self) -> None:
        """Until the running save is complete. Raises what ended it."""
        self._join()
        if self._problem:
            raise self._problem

    def _submit(self, act: Callable[[], None]) -> None:
        if self._pool is None:
            self._keep_problem(act)
        else:
            self._running = self._pool.submit(self._keep_problem, act)

    def _join(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None

    def _keep_problem(self, act: Callable[[], None]) -> None:
        if self._problem is None:
            try:
                act()
            except Exception as error:
                self._problem = error

    def _write(
        self, folder: Path, taken: checkpoint.Snapshot, entries: list[ledger.Entry], about: dict[str, Any]
    ) -> None:
        step = about["step"]
        parts = checkpoint.gather(entries, self.group)
        new = [entry for part in parts for entry in part if entry[0] >= self.committed]

        def ask_for_lease() -> str | None:
            return lease.loss(self.run.path, self.token)

        def write_ledger() -> None:
            ledger.write(self.run.ledger, self.committed, step, new)

        for pause in (*TRIES_AFTER_S, None):
            try:
                if lost := checkpoint.together(ask_for_lease if checkpoint.rank() == 0 else None, self.group)[0]:
                    raise UserError(lost)
                checkpoint.together(write_ledger if checkpoint.rank() == 0 else None, self.group)
                checkpoint.write(folder, taken, about, self.group)
                break
            except StorageError as error:
                if pause is None:
                    self._refused += 1
                    raise StorageError(
                        f"The checkpoint of step {step} could not be written in {len(TRIES_AFTER_S) + 1} tries: "
                        f"{error}. See to {self.run.path.parent}; the checkpoints before are as they were."
                    ) from error
                self.note(f"the checkpoint of step {step} is tried again in {pause:.0f} s: {error}")
                time.sleep(pause)
        self.committed, self._refused = step, 0


def background_group() -> Any:
    """A process group for a thread beside training: collectives of one group must not meet those of another thread."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def mark() -> torch.cuda.Event | None:
    """The point in the device's queue at which the tensors are as this call finds them."""
    return torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None


@contextmanager
def beside_compute(ready: torch.cuda.Event | None) -> Iterator[None]:
    """Copies inside go on a stream of their own that begins at `ready`, so that training's kernels are not held up."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
