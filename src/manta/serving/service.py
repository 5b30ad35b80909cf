"""What the API does, apart from HTTP: which model, which limits, and answers from an engine."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from manta.serving.catalog import Weights
from manta.serving.generation import Delta, Engine, EngineError, Request, Sampling
from manta.serving.prompts import Prompter, PromptError
from manta.serving.protocol import MOST_CHOICES, ApiError, Asked, AskedChat, AskedText

_LONGEST = 8192  # where a model does not say how many positions it has
_DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI has it
_UNDER_WAY_S = 1.0  # the cancellation of a request whose answers are cancelled already
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


@dataclass(frozen=True)
class Settings:
    """Limits of the API. `key_sha256` is a digest, so that the key itself is nowhere but with the clients."""

    key_sha256: str | None = None
    hosts: tuple[str, ...] = ()  # names that a request may call the server by; none: any
    max_body_bytes: int = 4 << 20
    max_model_len: int | None = None
    max_concurrency: int = 128
    timeout_s: float = 600


def digest(key: str) -> str:
    """What `Settings` keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Metrics:
    """Figures for Prometheus, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._of(Counter, "requests", "Requests by how they ended", "endpoint", "outcome")
        self.seconds = self._of(Histogram, "request_seconds", "Whole requests", "endpoint", buckets=_SECONDS)
        self.first = self._of(Histogram, "first_token_seconds", "To the first token", "endpoint", buckets=_SECONDS)
        self.tokens = self._of(Counter, "tokens", "Tokens of prompts and answers", "model", "kind")
        self.active = self._of(Gauge, "active_answers", "Answers under way, waiting ones among them")
        self.engine = self._of(Gauge, "engine", "The engine's own figures", "weights", "figure")

    def _of(self, kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
        return kind(f"manta_{name}", text, labels, registry=self.registry, **more)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Service:
    """Models by name over their engines (by the source of their weights)."""

    def __init__(self, catalog: Sequence[Weights], engines: Mapping[str, Engine], settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.started = int(time.time())
        self.draining = False
        self._active = 0
        self._engines = engines
        self._prompters = {model.name: Prompter(model, weights) for weights in catalog for model in weights.models}
        self._weights = {model.name: weights.source for weights in catalog for model in weights.models}
        lengths = {weights.source: _context(weights, settings.max_model_len) for weights in catalog}
        self._contexts = {name: lengths[source] for name, source in self._weights.items()}

    def models(self) -> list[dict[str, Any]]:
        """As /v1/models lists them; `manta` is for the chat page and `manta chat`."""
        return [
            {
                "id": name,
                "object": "model",
                "created": self.started,
                "owned_by": "manta",
                "manta": {
                    "chat": prompter.template is not None,
                    "mode": prompter.mode,
                    "tuned": prompter.model.tuned,
                    "prompt_template": prompter.model.prompt_template,
                    "example": prompter.model.example,
                    "max_model_len": self._contexts[name],
                },
            }
            for name, prompter in self._prompters.items()
        ]

    def prompter(self, model: str) -> Prompter:
        """Raises ApiError (404) for a model that is not served."""
        if model not in self._prompters:
            served = ", ".join(self._prompters)
            raise ApiError(
                404, f"The model {model!r} is not served here. Served: {served}.", "model_not_found", "model"
            )
        return self._prompters[model]

    def requests(self, asked: AskedChat | AskedText) -> list[Request]:
        """One for each choice of each prompt. Raises ApiError where the model cannot take it."""
        prompter = self.prompter(asked.model)
        try:
            if isinstance(asked, AskedChat):
                messages = [message.plain() for message in asked.messages]
                prompts = [prompter.chat(messages, asked.chat_template_kwargs)]
            else:
                prompts = [prompter.text(p) if isinstance(p, str) else prompter.ids(p) for p in asked.prompts]
        except PromptError as error:
            code = (
                "no_chat_template" if prompter.template is None and isinstance(asked, AskedChat) else "invalid_prompt"
            )
            raise ApiError(400, f"{str(error).removesuffix('.')}.", code, "prompt") from error
        if (count := len(prompts) * (asked.n or 1)) > MOST_CHOICES:
            raise ApiError(400, f"{count} answers asked, over the {MOST_CHOICES} of one request.", "invalid_value", "n")
        return [
            Request(asked.model, prompt, _choice(sampling, number), prompter.stop_ids)
            for prompt in prompts
            for sampling in [self._sampling(asked, len(prompt))]
            for number in range(asked.n or 1)
        ]

    def _sampling(self, asked: Asked, prompt: int) -> Sampling:
        context = self._contexts[asked.model]
        wanted = asked.max_completion_tokens if isinstance(asked, AskedChat) else None
        wanted = wanted or asked.max_tokens or (None if isinstance(asked, AskedChat) else _DEFAULT_TOKENS)
        if prompt + (wanted or 1) > context:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{prompt + (wanted or 1)} tokens ({prompt} in the prompt, {wanted or 1} in the completion). Shorten "
                "one of them.",
                "context_length_exceeded",
                "messages" if isinstance(asked, AskedChat) else "prompt",
            )
        return Sampling(
            max_tokens=wanted or context - prompt,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=asked.top_p or 1.0,
            top_k=max(asked.top_k or 0, 0),
            seed=asked.seed,
            stop=asked.stops,
        )

    def admit(self, count: int) -> None:
        """Take places for `count` answers, which `release` gives back. Raises ApiError (429, 503)."""
        if self.draining:
            raise ApiError(503, "The server is shutting down. Try again in a moment.", "shutting_down")
        if self._active + count > self.settings.max_concurrency:
            busy = f"{self._active} answers are under way, and the limit is {self.settings.max_concurrency}"
            raise ApiError(429, f"The server is busy: {busy}. Try again in a moment.", "too_many_requests")
        self._active += count
        self.metrics.active.set(self._active)

    def release(self, count: int) -> None:
        self._active -= count
        self.metrics.active.set(self._active)

    async def answers(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Delta]]:
        """(number of the request, what was added to its answer), as it comes, until all have ended.

        Raises ApiError (504) once the time is over; then, or when the iterator is closed, nothing goes on.
        """
        engine = self._engines[self._weights[requests[0].model]]
        arrived: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue()

        async def pump(number: int, request: Request) -> None:
            try:
                async with aclosing(engine.generate(request)) as deltas:  # type: ignore[type-var]
                    async for delta in deltas:
                        arrived.put_nowait((number, delta))
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                # The stream was, not this task: Ray Serve ends what a request has asked for, and then the request.
                await asyncio.sleep(_UNDER_WAY_S)
                arrived.put_nowait(EngineError("the answer was cancelled"))
            except Exception as error:
                arrived.put_nowait(error)

        count = self.metrics.tokens.labels
        count(requests[0].model, "prompt").inc(sum(len(request.prompt) for request in requests))
        generated = count(requests[0].model, "generated")
        pumps = [asyncio.create_task(pump(number, request)) for number, request in enumerate(requests)]
        left = len(requests)
        try:
            until = time.monotonic() + self.settings.timeout_s
            while left:
                # wait_for of Python 3.11 loses a cancellation that comes together with a token (cpython#86296)
                async with asyncio.timeout(until - time.monotonic()):
                    what = await arrived.get()
                if isinstance(what, Exception):
                    raise what
                generated.inc(what[1].tokens)
                left -= what[1].finish is not None
                yield what
        except TimeoutError as error:
            raise ApiError(504, f"No answer within {self.settings.timeout_s:g} s.", "timeout") from error
        finally:
            for each in pumps:
                each.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def scrape(self) -> bytes:
        """The metrics as Prometheus reads them."""
        for source, engine in self._engines.items():
            for name, value in (await engine.stats()).items():
                self.metrics.engine.labels(source, name).set(value)
        return self.metrics.text()

    async def check(self) -> None:
        """Raises if an engine does not answer."""
        async with asyncio.timeout(10):
            await asyncio.gather(*(engine.stats() for engine in self._engines.values()))

    async def drain(self, seconds: float) -> int:
        """Refuse what is new and wait for what is under way; returns how many answers were not finished in time."""
        self.draining = True
        until = time.monotonic() + seconds
        while self._active and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return self._active


def _choice(sampling: Sampling, number: int) -> Sampling:
    """Choices of one prompt have seeds of their own; the first has the one that was asked for."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)


def _context(weights: Weights, wanted: int | None) -> int:
    """Most tokens of prompt and answer together."""
    from transformers import AutoConfig

    about = AutoConfig.from_pretrained(weights.source, trust_remote_code=weights.trust_remote_code)
    own = getattr(about.get_text_config(), "max_position_embeddings", None)
    return min(filter(None, (own, wanted)), default=_LONGEST)
