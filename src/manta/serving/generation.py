"""What is asked of a model and what it answers: the contract that engines keep and the API is written against."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. `temperature` 0 takes the likeliest token; `top_k` 0 is no limit; lengths in tokens.

    With a `seed` the same request gets the same answer, whatever runs beside it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt of token ids for one model that is served. Generation also ends at any of `stop_ids`."""

    model: str
    prompt: list[int]
    sampling: Sampling
    stop_ids: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Delta:
    """What was added to an answer: text, the `tokens` that it took, and in the last one why it ended."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None

    def __add__(self, later: Delta) -> Delta:
        return Delta(self.text + later.text, self.tokens + later.tokens, later.finish)


class EngineError(Exception):
    """The engine could not go on with a request; others may not be touched."""


class Engine(Protocol):
    """Generates for many requests at once."""

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """The answer as it grows; the last delta has `finish`. To close the iterator early frees what it holds.

        Raises EngineError.
        """

    async def stats(self) -> dict[str, float]:
        """Figures for people and for Prometheus: requests running and waiting, and totals since the start."""
