"""`manta chat`: a conversation in the terminal with a server, ours or another's in this process."""

from __future__ import annotations

import json
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import httpx

from manta.errors import UserError

if TYPE_CHECKING:
    from manta.serving.catalog import Weights


@dataclass
class Talker:
    """A client of one server, with a conversation per model. `models` is what /v1/models says of each."""

    client: httpx.Client
    models: dict[str, dict[str, Any]]
    said: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def ask(self, name: str, text: str, system: str | None, **rule: Any) -> Iterator[str]:
        """The answer in pieces. Raises UserError with what the server says."""
        about = self.models[name]
        body: dict[str, Any] = {"model": name, "stream": True, **rule}
        past = self.said.setdefault(name, [{"role": "system", "content": system}] if system else [])
        if about.get("mode", "chat") == "chat":
            path, body["messages"] = "/v1/chat/completions", [*past, {"role": "user", "content": text}]
        else:
            path, body["prompt"] = "/v1/completions", text.replace("\\n", "\n")
        answer = ""
        for piece in self._events(path, body):
            for choice in piece.get("choices", ()):
                told = choice.get("text") or choice.get("delta", {}).get("content") or ""
                answer += told
                yield told
        past += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with _as_message(), self.client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise UserError(_told(response))
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise UserError(event["error"]["message"])
                    yield event

    def first(self, tuned: bool) -> str | None:
        """The first model that is, or is not, a tuned one."""
        return next((name for name, about in self.models.items() if about.get("tuned", False) is tuned), None)


@contextmanager
def remote(url: str, key: str | None) -> Iterator[Talker]:
    """A talker to the server at `url`. Raises UserError if there is none, or it refuses the key."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(600, connect=10)) as client:
        with _as_message():
            response = client.get("/v1/models")
        if response.status_code == 401 and not key:
            raise UserError("The server wants an API key: --api_key_env NAME or --api_key_file FILE.")
        if response.status_code != 200:
            raise UserError(_told(response))
        yield Talker(client, {each["id"]: each.get("manta", {}) for each in response.json()["data"]})


@contextmanager
def local(catalog: Sequence[Weights], device: str, dtype: str) -> Iterator[Talker]:
    """The same models in this process, without Ray: the API on a free port here, with a key that nobody else has."""
    import uvicorn

    from manta.serving.api import build
    from manta.serving.loading import load_engine
    from manta.serving.service import Service, Settings, digest

    key = secrets.token_urlsafe(32)
    engines = {weights.source: load_engine(weights, device, dtype) for weights in catalog}
    service = Service(catalog, engines, Settings(digest(key), ("127.0.0.1",)))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # No logging of uvicorn's: setting it up closes every handler there is, and absl's takes its stream with it.
        server = uvicorn.Server(uvicorn.Config(build(service), log_config=None, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            with remote(f"http://127.0.0.1:{listener.getsockname()[1]}", key) as talker:
                yield talker
        finally:
            server.should_exit = True
            thread.join()
            for engine in engines.values():
                engine.close()


def typed(source: TextIO) -> Iterator[str]:
    """Lines as they are typed, with a sign where somebody sits there."""
    if not source.isatty():
        yield from (line.rstrip("\r\n") for line in source)
        return
    import readline  # noqa: F401  # lets `input` edit the line and go back to earlier ones

    while True:
        try:
            yield input("› ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def converse(
    talker: Talker, lines: Iterable[str], name: str | None = None, system: str | None = None, **rule: Any
) -> None:
    """Answer each line; one that begins with / is a command. Raises UserError, unless somebody types."""
    asking = [_known(talker, name or talker.first(tuned=True) or next(iter(talker.models)))]
    rule = {key: value for key, value in rule.items() if value is not None}
    if at_terminal := sys.stdin.isatty() and not isinstance(lines, list):
        _note(f"{asking[0]} of {', '.join(talker.models)}. /base /tuned /both /model NAME /new /quit")
    for line in lines:
        try:
            if line.startswith("/"):
                asking = _command(talker, line, asking)
                if not asking:
                    return
            elif line.strip():
                _answer(talker, asking, line, system, rule)
        except UserError as error:
            if not at_terminal:
                raise
            _note(f"manta: {error}")


def _command(talker: Talker, line: str, asking: list[str]) -> list[str]:
    """Which models are asked from now on; none to end."""
    verb, _, rest = line.partition(" ")
    base, tuned = talker.first(tuned=False), talker.first(tuned=True)
    chosen: dict[str, list[Any]] = {
        "/base": [base],
        "/tuned": [tuned],
        "/both": [base, tuned],
        "/model": [rest.strip()],
        "/new": asking,
    }
    if verb == "/quit":
        return []
    if verb not in chosen:
        raise UserError(f"{verb} is no command. There are: {', '.join(chosen)}, /quit.")
    if verb == "/new":
        talker.said.clear()
    names = [_known(talker, each) for each in chosen[verb]]
    _note(f"asking {' and '.join(names)}")
    return names


def _known(talker: Talker, name: str | None) -> str:
    if name is None:
        raise UserError(f"There is no such model here. Served: {', '.join(talker.models)}.")
    if name not in talker.models:
        raise UserError(f"{name!r} is not served. Served: {', '.join(talker.models)}.")
    return name


def _answer(talker: Talker, names: list[str], text: str, system: str | None, rule: dict[str, Any]) -> None:
    """To standard output, as it comes. Ctrl-C ends this answer only."""
    for name in names:
        if len(names) > 1:
            print(f"{name}: ", end="")
        try:
            for piece in talker.ask(name, text, system, **rule):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            _note(" (stopped)")
        print(flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _told(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answers {response.status_code}. Is it `manta serve`, or another with OpenAI's API?"


@contextmanager
def _as_message() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise UserError(f"The server does not answer: {error}. Start one with `manta serve`, or see --url.") from error
