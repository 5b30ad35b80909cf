"""The HTTP API: OpenAI's paths and forms over a `Service`, and the chat page."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from manta.serving.generation import Delta, Request
from manta.serving.protocol import ApiError, Asked, AskedChat, AskedText, parse, usage
from manta.serving.service import Service, digest

PAGE = Path(__file__).with_name("chat.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def build(service: Service) -> FastAPI:
    """The application. It logs no request, so neither prompts nor keys."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _refused)
    settings = service.settings

    def known_host(http: HttpRequest) -> None:
        """Against pages that reach a local server under a name of their own (DNS rebinding)."""
        if settings.hosts and http.url.hostname not in settings.hosts:
            raise ApiError(403, f"This server is not called {http.url.hostname}.", "host_not_allowed")

    def authorized(http: HttpRequest) -> None:
        if settings.key_sha256 is None:
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(digest(given.strip()), settings.key_sha256) or scheme.lower() != "bearer":
            raise ApiError(401, "Incorrect API key. Send it as 'Authorization: Bearer KEY'.", "invalid_api_key")

    open_to_all = APIRouter(dependencies=[Depends(known_host)])
    guarded = APIRouter(dependencies=[Depends(known_host), Depends(authorized)])

    @open_to_all.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    @open_to_all.get("/health")
    async def health() -> Response:
        if service.draining:
            raise ApiError(503, "The server is shutting down.", "shutting_down")
        try:
            await service.check()
        except Exception as error:
            raise ApiError(503, f"An engine does not answer: {type(error).__name__}.", "engine_failed") from error
        return JSONResponse({"status": "ok", "needs_key": settings.key_sha256 is not None})

    @guarded.get("/metrics")
    async def metrics() -> Response:
        return Response(await service.scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @guarded.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    @guarded.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.prompter(name)
        return JSONResponse(next(each for each in service.models() if each["id"] == name))

    @guarded.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        return await _answer(service, http, AskedChat, CHAT)

    @guarded.post("/v1/completions")
    async def text(http: HttpRequest) -> Response:
        return await _answer(service, http, AskedText, TEXT)

    app.include_router(open_to_all)
    app.include_router(guarded)
    return app


@dataclass(frozen=True)
class Form:
    """How an endpoint writes its answers."""

    endpoint: str
    prefix: str
    whole_object: str
    piece_object: str

    def choice(self, number: int, answer: Delta) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": answer.text}} if self is CHAT else {"text": answer.text}
        return {"index": number, **said, "logprobs": None, "finish_reason": answer.finish}

    def piece(self, number: int, delta: Delta, first: bool) -> dict[str, Any]:
        if self is not CHAT:
            return self.choice(number, delta)
        said = ({"role": "assistant"} if first else {}) | ({"content": delta.text} if delta.text or first else {})
        return {"index": number, "delta": said, "logprobs": None, "finish_reason": delta.finish}


CHAT = Form("chat.completions", "chatcmpl-", "chat.completion", "chat.completion.chunk")
TEXT = Form("completions", "cmpl-", "text_completion", "text_completion")


async def _answer(service: Service, http: HttpRequest, kind: type[AskedChat | AskedText], form: Form) -> Response:
    """Read, check, generate. What comes before the first token is an HTTP status, also of a stream."""
    ticket = _Ticket(service, form.endpoint)
    try:
        asked = parse(kind, await _body(http, service.settings.max_body_bytes))
        requests = await asyncio.to_thread(service.requests, asked)
        ticket.admit(len(requests))
        head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": asked.model}
        answers = ticket.timed(service.answers(requests))
        if asked.stream:
            first = await anext(answers)
            return _Stream(_events(form, head, asked, requests, first, answers, ticket), ticket)
        whole = [Delta() for _ in requests]
        async for number, delta in answers:
            whole[number] += delta
        ticket.close("ok")
        spent = usage(_prompt_tokens(asked, requests), sum(answer.tokens for answer in whole))
        choices = [form.choice(number, answer) for number, answer in enumerate(whole)]
        return JSONResponse({**head, "object": form.whole_object, "choices": choices, "usage": spent})
    except BaseException as error:
        ticket.close(_outcome(error))
        raise


class _Ticket:
    """The places of one HTTP request, given back once, and what is measured of it."""

    def __init__(self, service: Service, endpoint: str) -> None:
        self._service = service
        self._endpoint = endpoint
        self._start = time.monotonic()
        self._places = 0
        self._open = True

    def admit(self, count: int) -> None:
        self._service.admit(count)
        self._places = count

    async def timed(self, answers: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[tuple[int, Delta]]:
        first = True
        try:
            async for each in answers:
                if first:
                    self._service.metrics.first.labels(self._endpoint).observe(time.monotonic() - self._start)
                    first = False
                yield each
        finally:
            await answers.aclose()  # type: ignore[attr-defined]

    def close(self, outcome: str) -> None:
        if self._open:
            self._open = False
            self._service.release(self._places)
            self._service.metrics.requests.labels(self._endpoint, outcome).inc()
            self._service.metrics.seconds.labels(self._endpoint).observe(time.monotonic() - self._start)


class _Stream(StreamingResponse):
    """Server-sent events that give the request's places back however the connection ends."""

    def __init__(self, events: AsyncIterator[str], ticket: _Ticket) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._ticket = ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
            self._ticket.close("cancelled")  # where the last event was not reached


async def _events(
    form: Form,
    head: dict[str, Any],
    asked: Asked,
    requests: list[Request],
    first: tuple[int, Delta],
    answers: AsyncIterator[tuple[int, Delta]],
    ticket: _Ticket,
) -> AsyncIterator[str]:
    seen: set[int] = set()
    tokens = 0
    head = {**head, "object": form.piece_object}
    more = {"usage": None} if asked.with_usage else {}
    try:
        number, delta = first
        while True:
            tokens += delta.tokens
            piece = form.piece(number, delta, number not in seen)
            if delta.text or delta.finish or number not in seen:
                yield _event({**head, "choices": [piece], **more})
            seen.add(number)
            try:
                number, delta = await anext(answers)
            except StopAsyncIteration:
                break
        if asked.with_usage:
            yield _event({**head, "choices": [], "usage": usage(_prompt_tokens(asked, requests), tokens)})
        yield "data: [DONE]\n\n"
        ticket.close("ok")
    except Exception as error:  # the status is sent already
        ticket.close(_outcome(error))
        yield _event(_as_api_error(error).body())
    finally:
        await answers.aclose()  # type: ignore[attr-defined]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _prompt_tokens(asked: Asked, requests: list[Request]) -> int:
    """Each prompt once, however many choices it has."""
    return sum(len(request.prompt) for request in requests[:: asked.n or 1])


async def _body(http: HttpRequest, most: int) -> bytes:
    """Raises ApiError for what is no JSON (415) or too large (413), before it is all read."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another origin cannot send it without asking first
        raise ApiError(415, "Send Content-Type: application/json.", "unsupported_media_type")
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > most:
            raise ApiError(413, f"The body is over {most} bytes. Send less.", "request_too_large")
    return bytes(body)


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.", "not_found" if error.status_code == 404 else None)
    return ApiError(500, f"The engine failed: {type(error).__name__}. The server's log says why.", "engine_failed")


def _outcome(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError | ClientDisconnect | GeneratorExit):
        return "cancelled"
    return _as_api_error(error).code or "error"


async def _refused(http: HttpRequest, error: Exception) -> Response:
    refused = _as_api_error(error)
    return JSONResponse(refused.body(), refused.status, refused.headers)
