"""What is trained, copied into the memory of two nodes after each step: a loss costs a step, not a save interval.

On each node one actor, a keeper, holds the last copies; it outlives the workers. Each rank sends its part to the
keepers of its own node and of another one. A part is one safetensors file in memory: adapters or this rank's shards,
their optimizer state, and how far the run is, under a digest. A restart takes the newest copy of which every rank's
part is there and whole, on any number of workers; the checkpoints on disk are what outlives the driver.

Between two optimizer steps what is trained stands still, so that a thread reads it while the next step computes.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from manta import checkpoint, ledger, parcel
from manta.keeper import KEPT, Keeper, Key, digest
from manta.progress import NAMESPACE
from manta.saver import background_group, beside_compute, mark

Mode = Literal["auto", "every", "off"]

SHARE = 0.03  # of the step time that copies may cost in mode auto
MEMORY_SHARE = 0.25  # of a node's free memory that copies may take in mode auto
_TIMEOUT_S = 30.0


@dataclass
class Copy:
    """The copy after `step` steps, taken on `world` workers; `homes` are the keepers of the ranks' parts, by name."""

    key: Key
    world: int
    homes: list[str]

    @property
    def step(self) -> int:
        return self.key[1]

    @cached_property
    def about(self) -> list[dict[str, Any]]:
        """Of each rank's part, what it holds besides tensors."""
        return [self._ask(rank, "about") for rank in range(self.world)]

    @cached_property
    def folder(self) -> Path:
        """A folder from which the library reads the trainer's state."""
        folder = Path(tempfile.mkdtemp(prefix="manta-copy-"))
        (folder / checkpoint.TRAINER_STATE).write_text(self.about[0]["state"], encoding="utf-8")
        return folder

    @property
    def committed(self) -> int:
        """Step of the last checkpoint on disk at that time."""
        return self.about[0]["committed"]

    @property
    def entries(self) -> list[ledger.Entry]:
        """What all ranks had consumed since that checkpoint."""
        return sorted((step, index, rows) for about in self.about for step, index, rows in about["entries"])

    def load(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        """Put model, optimizer and scheduler back as they were, for this world size."""
        names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        wanted = {name: parameter for parameter, name in names.items()}
        same = self.world == checkpoint.world()
        for rank in range(self.world):
            # Rank 0's part also holds what is the same everywhere.
            if not same or rank in (0, checkpoint.rank()):
                parcel.unpack(self._ask(rank, "get"), wanted, optimizer)
        for group, saved in zip(optimizer.param_groups, self.about[0]["groups"], strict=True):
            for key, value in saved.items():  # JSON has no tuples, and a later load compares the types
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        scheduler.load_state_dict(self.about[0]["scheduler"])

    def _ask(self, rank: int, what: str) -> Any:
        import ray

        return ray.get(getattr(_actor(self.homes[rank]), what).remote(self.key, rank), timeout=_TIMEOUT_S)


def keepers(mailbox: Any, nodes: list[str]) -> dict[str, str]:
    """Keepers by node: of each node that runs workers, of one other if they are all on one, and of earlier ones.

    Those of earlier nodes may be gone. Rank 0 asks, for all.
    """
    import ray

    names: list[Any] = [{}]
    if checkpoint.rank() == 0:
        if len(set(nodes)) == 1:
            others = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in nodes)
            nodes = [*nodes, *others[:1]]
        names = [ray.get(mailbox.beside.remote(sorted(set(nodes)), Keeper))]
    return checkpoint.broadcast(names)[0]


def newest(names: list[str], after: int) -> Copy | None:
    """The newest copy that is whole, if it is of a later step than `after`. Keepers that do not answer are left out.

    Rank 0 decides for all.
    """
    return checkpoint.broadcast([_newest(names, after) if checkpoint.rank() == 0 else None])[0]


def _newest(names: list[str], after: int) -> Copy | None:
    import ray

    asked: dict[Any, str] = {}
    for name in names:
        with contextlib.suppress(ValueError):  # its node is gone, and Ray knows it
            asked[_actor(name).whole_parts.remote()] = name
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_TIMEOUT_S) if asked else ([], [])
    homes: dict[Key, dict[int, tuple[str, int]]] = {}
    for answer in answered:
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError:
            continue
        for key, parts in found.items():
            for rank, world in parts.items():
                homes.setdefault(key, {})[rank] = (asked[answer], world)
    for key in sorted(homes, key=lambda key: (key[1], key[0]), reverse=True):
        parts = homes[key]
        worlds = {world for _, world in parts.values()}
        if key[1] > after and len(worlds) == 1 and set(parts) == set(range(*worlds)):
            return Copy(key, worlds.pop(), [parts[rank][0] for rank in sorted(parts)])
    return None


def _actor(name: str) -> Any:
    import ray

    return ray.get_actor(name, namespace=NAMESPACE)


class Copier:
    """Copies of this attempt, one at a time. Collective: all ranks make one, and call it at the same steps.

    This rank's part goes to the keeper of its own `node` and of the next one that has one.
    """

    def __init__(self, names: dict[str, str], node: str, attempt: int, mode: Mode, note: Callable[[str], None]):
        import ray

        alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
        around = sorted(alive & names.keys() | {node})
        following = around[(around.index(node) + 1) % len(around)]
        self.homes = [_actor(names[each]) for each in dict.fromkeys((node, following))]
        self.attempt, self.mode, self.note = attempt, mode, note
        self.next = 0  # the next step that is copied
        self._group = background_group()
        self._pool = ThreadPoolExecutor(1, "manta-copy")
        self._running: Future[None] | None = None
        self._read = threading.Event()
        self._read.set()
        self._costs: list[float] = []
        self._stall = 0.0
        self._began: tuple[int, float] | None = None  # step and time of the last copy

    def take(self, step: int, model: Any, optimizer: Any, about: Callable[[], dict[str, Any]]) -> None:
        """Copy what is trained after `step` steps, if it is this step's turn; `about` is what JSON can carry."""
        start = time.perf_counter()
        if self._running is not None:
            self._running.result()  # from here on `next` is known, and the same on all ranks
            self._running = None
        if step < self.next or self.mode == "off":
            return
        step_time = (start - self._began[1] - self._stall) / (step - self._began[0]) if self._began else None
        self._began = (step, start)
        self._stall = 0.0
        tensors, boxes = parcel.trained(model, optimizer)
        described = {
            **about(),
            "boxes": boxes,
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        }
        self._read.clear()
        self._running = self._pool.submit(self._copy, step, tensors, described, mark(), step_time)
        self._stall = time.perf_counter() - start

    def wait_read(self) -> None:
        """Call before what is trained changes."""
        if not self._read.is_set():
            start = time.perf_counter()
            self._read.wait()
            self._stall += time.perf_counter() - start

    def close(self) -> None:
        self._pool.shutdown()

    def _copy(
        self, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any], ready: Any, step_time: float | None
    ) -> None:
        start = time.thread_time()
        kept, size = 0.0, 0
        try:
            try:
                with beside_compute(ready):
                    payload = parcel.pack(tensors, about)
            finally:
                self._read.set()
            size = len(payload)
            kept = self._send(step, payload)
        except Exception as error:  # a copy that fails costs no more than that copy
            self.note(f"no copy of step {step}: {type(error).__name__}: {error}")
        on_cpu = not torch.cuda.is_available()
        cost = self._stall + (time.thread_time() - start + kept if on_cpu else 0.0)
        needed = size * KEPT * len(self.homes)
        # What follows is the same on all ranks, and no rank is a copy ahead.
        costs = checkpoint.gather((cost, step_time, needed > _free_memory()), self._group)
        self._costs = [*self._costs[-6:], max(cost for cost, _, _ in costs)]
        self.next = step + self._interval(costs[0][1])
        if self.mode == "auto" and any(too_large for _, _, too_large in costs):
            self.mode = "off"
            self.note("copies after each step are off: they would take too much of a node's free memory")

    def _send(self, step: int, payload: np.ndarray) -> float:
        import ray

        where = (self.attempt, step), checkpoint.rank(), checkpoint.world(), digest(payload)
        shared = ray.put(payload)
        took = 0.0
        for home, answer in [(home, home.put.remote(*where, shared)) for home in self.homes]:
            try:
                took += ray.get(answer, timeout=_TIMEOUT_S)
            except ray.exceptions.RayActorError:  # its node is lost: the rest of this attempt does without
                self.homes.remove(home)
                self.note(f"a keeper of copies is gone after step {step}; {len(self.homes)} left")
        return took

    def _interval(self, step_time: float | None) -> int:
        if self.mode != "auto" or step_time is None:
            return 1
        return max(1, math.ceil(statistics.median(self._costs) / (SHARE * max(step_time, 1e-6))))


def _free_memory() -> float:
    import psutil

    return MEMORY_SHARE * psutil.virtual_memory().available
