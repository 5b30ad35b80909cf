"""The transformers engine: requests join and leave one running batch between two tokens (iteration-level scheduling).

One thread computes. Requests reach it through a list under a lock, tokens leave it through the event loop of whoever
asked. See Yu et al., "Orca" (OSDI 2022).
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from manta.serving.batch import BASE, Batch
from manta.serving.generation import Delta, EngineError, Request
from manta.serving.sampling import Answer, draw

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Of one batch: rows, tokens of all rows as padded, and prompt tokens that join between two steps."""

    rows: int = 32
    tokens: int = 65_536
    joining_tokens: int = 4096


@dataclass(eq=False)
class Row:
    """A request on its way: who waits for it, and what it has so far."""

    request: Request
    adapter: str
    answer: Answer
    chances: random.Random
    loop: asyncio.AbstractEventLoop
    outbox: asyncio.Queue[Delta | EngineError] = field(default_factory=asyncio.Queue)
    ids: list[int] = field(default_factory=list)  # the prompt and the answer so far
    left: bool = False  # nobody waits for it any more

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)

    def tell(self, what: Delta | EngineError) -> None:
        try:
            self.loop.call_soon_threadsafe(self.outbox.put_nowait, what)
        except RuntimeError:  # the loop is closed: whoever waited is gone
            self.left = True


class TransformersEngine:
    """An `Engine` over a model of transformers. `adapters` maps the names of models to PEFT's; others are the base."""

    def __init__(self, model: Any, tokenizer: Any, adapters: Mapping[str, str], limits: Limits | None = None) -> None:
        self._batch = Batch(model)
        self._tokenizer = tokenizer.backend_tokenizer
        self._adapters = adapters
        self._limits = limits or Limits()
        self._rows: list[Row] = []  # as in the batch
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._totals = {"steps": 0.0, "step_rows": 0.0, "joined": 0.0}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        """The answer, in pieces of as many tokens as came since the last one."""
        row = Row(
            request,
            self._adapters.get(request.model, BASE),
            Answer(self._tokenizer, request),
            random.Random(request.sampling.seed),
            asyncio.get_running_loop(),
        )
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            self._waiting.append(row)
            self._changed.notify()
        try:
            finish = None
            while finish is None:
                pieces = [await row.outbox.get()]
                while not row.outbox.empty():
                    pieces.append(row.outbox.get_nowait())
                told = Delta()
                for piece in pieces:
                    if isinstance(piece, EngineError):
                        raise piece
                    told += piece
                finish = told.finish
                yield told
        finally:
            row.left = True

    async def stats(self) -> dict[str, float]:
        with self._changed:
            return {"running": len(self._rows), "waiting": len(self._waiting), **self._totals}

    def check(self) -> None:
        """Raises EngineError if nothing computes any more."""
        if not self._thread.is_alive():
            raise EngineError("the engine's thread has ended")

    def close(self) -> None:
        """End the thread; requests under way fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._rows or self._waiting or self._closed):
                    self._changed.wait()
                if self._closed:
                    for row in (*self._rows, *self._waiting):
                        row.tell(EngineError("the engine is closed"))
                    return
                self._waiting = deque(row for row in self._waiting if not row.left)
                stay = self._staying()
                leaving, self._rows = len(self._rows) - len(stay), [self._rows[at] for at in stay]
                joining = self._admitted()
            try:
                if leaving:
                    self._batch.keep(stay)
                if self._rows:
                    self._take(self._rows, self._batch.step([row.ids[-1] for row in self._rows]))
                    self._count(steps=1, step_rows=len(self._rows))
                if joining:
                    adapters = [row.adapter for row in joining]
                    self._take(joining, self._batch.join([row.ids for row in joining], adapters))
                    self._count(joined=len(joining))
                    with self._changed:
                        self._rows += joining
            except Exception as error:  # out of memory, say: those in the batch fail, the engine does not
                logger.exception("a step failed")
                self._fail([*self._rows, *joining], f"{type(error).__name__}: {error}")

    def _staying(self) -> list[int]:
        """Which rows go on. The last to come wait again, with what they have, where all would get too long."""
        stay = [at for at, row in enumerate(self._rows) if not (row.left or row.answer.finish)]
        while len(stay) > 1 and not self._fits([self._rows[at] for at in stay]):
            self._waiting.appendleft(self._rows[stay.pop()])
        return stay

    def _fits(self, rows: list[Row]) -> bool:
        """Whether these rows may run together until each has another token."""
        return len(rows) <= self._limits.rows and len(rows) * (1 + _longest(rows)) <= self._limits.tokens

    def _admitted(self) -> list[Row]:
        """Who joins now, in the order of arrival: as many as the limits let in; alone, everybody may."""
        joining: list[Row] = []
        while self._waiting:
            more = [*joining, self._waiting[0]]
            rows = [*self._rows, *more]
            if len(rows) > 1 and not self._fits(rows):
                break
            if joining and len(more) * _longest(more) > self._limits.joining_tokens:
                break
            joining.append(self._waiting.popleft())
        return joining

    @staticmethod
    def _take(rows: list[Row], logits: Any) -> None:
        """Draw each row's next token and tell whoever waits for it."""
        chances = [row.chances.random() for row in rows]
        for row, token in zip(rows, draw(logits, [row.request.sampling for row in rows], chances), strict=True):
            row.ids.append(token)
            row.tell(row.answer.add(token))

    def _fail(self, rows: list[Row], why: str) -> None:
        with self._changed:
            self._rows = []
        self._batch.clear()
        for row in rows:
            row.tell(EngineError(why))

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._totals[name] += value


def _longest(rows: list[Row]) -> int:
    return max(len(row.ids) for row in rows)
