"""How many seconds each phase of a run took, by the wall."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

# What rank 0 says when it was: its process started, its train function entered, its model there.
BEGUN = ("process", "train_func", "model")
# What passes from `fit` to the end of the first step, between these.
PARTS = ("start_workers", "imports", "model", "first_step")


class Phases:
    """Wall seconds per phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.time()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self.seconds[name] = round(time.time() - start, 3)

    def until_first_step(self, fit: float, begun: dict[str, float], first: float) -> None:
        """From `fit` to the end of the first step, and its parts as far as rank 0 of the first workers told when each
        was `begun`: Ray starts its controller and a process, that imports, the model is made, a step is done."""
        self.seconds["until_first_step"] = round(first - fit, 3)
        times = [fit, *(begun[name] for name in BEGUN if name in begun), first]
        if len(times) == len(BEGUN) + 2:
            self.seconds |= {name: round(b - a, 3) for name, (a, b) in zip(PARTS, pairwise(times), strict=True)}
