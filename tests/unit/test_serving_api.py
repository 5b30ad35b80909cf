"""The API without Ray: what a process that serves would have to be brought to otherwise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from manta.cli import main
from manta.cli_serve import api_key
from manta.errors import UserError
from manta.serving import vllm
from manta.serving.api import build
from manta.serving.catalog import Model, Weights, catalog
from manta.serving.deploy import Plan, chosen_engine
from manta.serving.generation import Delta, EngineError, Request, Sampling
from manta.serving.loading import load_engine
from manta.serving.scheduler import TransformersEngine
from manta.serving.service import Service, Settings
from served import TEMPLATE, base, run_over

TEXT = {"model": "base", "prompt": "x", "max_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("api")
    base(where / "base")
    run_over(where / "base", where / "results" / "tuned", 1, input_template="Q: {q}\nA: ")
    run_over(where / "base", where / "results" / "other", 2)
    run_over(where / "base", where / "results" / "full", 3, full_ft=True)
    return where


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TransformersEngine]:
    made = load_engine(weights(folder))
    yield made
    made.close()


def weights(folder: Path) -> Weights:
    return Weights(str(folder / "base"), [Model("base", str(folder / "base"), tuned=False)])


def service_of(folder: Path, engine: Any, **settings: Any) -> Service:
    return Service([weights(folder)], {str(folder / "base"): engine}, Settings(**settings))


def ask(service: Service, path: str, body: dict[str, Any] | None = None, **how: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(build(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request("POST" if body else "GET", path, json=body, **how)

    return asyncio.run(once())


class Endless:
    """An engine that says one token and then nothing, and knows when nobody waits any more."""

    left = 0

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        try:
            yield Delta("so", 1)
            await asyncio.Event().wait()
        finally:
            self.left += 1

    async def stats(self) -> dict[str, float]:
        return {}


def test_an_answer_that_takes_too_long_is_504_and_frees_its_place(folder):
    endless = Endless()
    service = service_of(folder, endless, timeout_s=0.5)
    slow = ask(service, "/v1/completions", TEXT)
    assert slow.status_code == 504 and slow.json()["error"]["code"] == "timeout"
    in_stream = ask(service, "/v1/completions", {**TEXT, "stream": True})
    told = [json.loads(line[6:]) for line in in_stream.text.splitlines() if line.startswith("data: {")]
    assert told[0]["choices"][0]["text"] == "so" and told[-1]["error"]["code"] == "timeout"
    assert "[DONE]" not in in_stream.text
    assert service._active == 0 and endless.left == 2


class Relayed:
    """An engine in another process: what it says, or that it was cancelled, arrives by a future."""

    def __init__(self) -> None:
        self.said: asyncio.Future[Delta] = asyncio.get_running_loop().create_future()

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        yield await self.said
        await asyncio.Event().wait()


@pytest.mark.parametrize("turns", range(8))
def test_who_leaves_while_a_token_arrives_frees_the_place(folder, turns):
    """However many turns of the event loop lie between the two."""

    async def leave() -> int:
        service = service_of(folder, relayed := Relayed())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(build(service)), base_url="http://host") as client:
            asking = asyncio.create_task(client.post("/v1/completions", json=TEXT))
            while not service._active:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            relayed.said.set_result(Delta("so", 1))
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking], timeout=5)
            return service._active

    assert asyncio.run(leave()) == 0


def test_an_engine_whose_stream_is_cancelled_ends_the_request(folder):
    async def cancelled() -> httpx.Response:
        service = service_of(folder, relayed := Relayed())
        relayed.said.cancel()
        transport = httpx.ASGITransport(build(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await asyncio.wait_for(client.post("/v1/completions", json=TEXT), 20)

    answer = asyncio.run(cancelled())
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"


def test_a_server_that_drains_refuses_and_waits(folder, engine):
    service = service_of(folder, engine)

    async def draining() -> int:
        service.admit(1)
        asyncio.get_running_loop().call_later(0.2, service.release, 1)
        return await service.drain(10)

    assert asyncio.run(draining()) == 0
    for path, body in (("/v1/completions", TEXT), ("/health", None)):
        refused = ask(service, path, body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert refused.headers["retry-after"] == "1"
    service.admit = lambda count: None  # type: ignore[method-assign]
    service._active = 3
    assert asyncio.run(service.drain(0.1)) == 3


class Broken:
    """An engine whose replica is lost after the first token."""

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        yield Delta("so", 1)
        raise EngineError("the replica died: secret detail")

    async def stats(self) -> dict[str, float]:
        raise EngineError("the replica died")


def test_an_engine_that_fails_is_500_in_openais_form(folder):
    service = service_of(folder, Broken())
    failed = ask(service, "/v1/completions", TEXT)
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert "secret detail" not in failed.text
    in_stream = ask(service, "/v1/completions", {**TEXT, "stream": True})
    assert '"so"' in in_stream.text and "engine_failed" in in_stream.text
    assert ask(service, "/health").json()["error"]["code"] == "engine_failed"
    assert service._active == 0


def test_runs_over_one_base_share_its_weights_and_full_ones_have_their_own(folder):
    results = folder / "results"
    found = catalog([str(results / name) for name in ("tuned", "full")] + [f"mine={results / 'other'}"], [])
    assert [(each.source, [model.name for model in each.models]) for each in found] == [
        (str(folder / "base"), ["base", "tuned", "mine"]),
        (str(results / "full" / "checkpoint_00000010" / "model"), ["full"]),
    ]
    assert list(found[0].adapters) == ["tuned", "mine"]
    tuned = found[0].models[1]
    assert tuned.prompt_template == "Q: {q}\nA: " and "capital of France" in str(tuned.example)
    without = catalog([str(results / "tuned")], [], with_base=False)
    assert [model.name for each in without for model in each.models] == ["tuned"]
    hub, folder_of = catalog([], ["org/name", f"x={folder / 'base'}"])
    assert hub.models[0].name == hub.source == "org/name" and folder_of.models[0].name == "x"


@pytest.mark.parametrize(
    ("runs", "models", "says"),
    [
        ([], [], "Nothing to serve"),
        (["{}/results/tuned", "tuned={}/results/other"], [], "Several models are named tuned"),
        (["{}/base"], [], "not a run"),
        ([], ["{}/results"], "--run for a run"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(folder, runs, models, says):
    arguments = [f for run in runs for f in ("--run", run.format(folder))]
    arguments += [f for model in models for f in ("--model", model.format(folder))]
    done = CliRunner().invoke(main, ["serve", *arguments])
    assert done.exit_code == 2 and says in done.output and "Traceback" not in done.output


def test_a_damaged_checkpoint_is_not_served(folder, tmp_path):
    run = run_over(folder / "base", tmp_path / "results" / "broken", 1)
    adapter = run.path / "checkpoint_00000010" / "model" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    done = CliRunner().invoke(main, ["serve", "--run", str(run.path)])
    assert done.exit_code == 2 and "no usable checkpoint" in done.output


def test_keys_come_by_reference_and_leave_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", " sk-x \n")
    assert api_key("SOME_KEY", None) == "sk-x"
    with pytest.raises(UserError, match="no such variable"):
        api_key("SOME_KEY", None)  # nothing that starts from here has it
    (tmp_path / "key").write_text("sk-y\n")
    assert api_key(None, str(tmp_path / "key")) == "sk-y"
    with pytest.raises(UserError, match="cannot be read"):
        api_key(None, str(tmp_path / "none"))
    done = CliRunner().invoke(main, ["serve", "--model", "x", "--host", "0.0.0.0"])
    assert done.exit_code == 2 and "needs a key" in done.output


def test_a_taken_port_is_a_message(folder):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(main, ["serve", "--model", str(folder / "base"), "--port", port])
    assert done.exit_code == 2 and port in done.output and "another --host or --port" in done.output


def test_vllm_is_asked_for_what_the_api_was_asked_for(folder):
    assert chosen_engine("auto") == "transformers"
    with pytest.raises(UserError, match="not installed"):
        chosen_engine("vllm")
    rule = Sampling(7, temperature=0.5, top_p=0.9, seed=3, stop=("END",))
    body = vllm.asked(Request("tuned", [1, 2], rule, frozenset({9, 5})))
    assert body["prompt"] == [1, 2] and body["top_k"] == -1 and body["stop_token_ids"] == [5, 9]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["seed"]) == (7, 0.5, 0.9, 3)
    kwargs = vllm.engine_kwargs(catalog([str(folder / "results" / "tuned")], [])[0], Plan(Settings()))
    assert kwargs["enable_lora"] and kwargs["max_lora_rank"] == 8 and kwargs["max_num_seqs"] == 32


def test_vllms_events_become_deltas():
    piece = {"choices": [{"index": 0, "text": "so", "finish_reason": None}], "usage": {"completion_tokens": 2}}
    last = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    events = [f"data: {json.dumps(each)}\n\n" for each in (piece, last, usage)]
    told = vllm.deltas([events[0] + events[1], events[2], "data: [DONE]\n\n"])
    assert told == [(Delta("so"), 2), (Delta("", 0, "stop"), 3)]
    with pytest.raises(EngineError, match="too long"):
        vllm.deltas('data: {"error": {"message": "too long", "code": 400}}\n\n')


def test_the_chat_template_of_conversations_wins_over_the_tokenizers(folder):
    from manta.serving.prompts import Prompter

    own = Prompter(Model("base", str(folder / "base")), weights(folder))
    assert own.mode == "chat" and own.template == TEMPLATE
    tuned = Prompter(Model("t", str(folder / "base"), chat_template="{{ messages[0]['content'] }}"), weights(folder))
    text = tuned.tokenizer.decode(tuned.chat([{"role": "user", "content": "Paris"}], {}))
    assert text == "Paris"


def test_chat_serves_a_run_in_its_own_process(folder, engine):
    tuned = str(folder / "results" / "tuned")
    arguments = ["chat", "--run", tuned, "--max_tokens", "6", "--temperature", "0"]
    done = CliRunner().invoke(main, arguments, input="x\n/base\nx\n")
    assert done.exit_code == 0, done.output
    said = ask(service_of(folder, engine), "/v1/completions", {**TEXT, "max_tokens": 6, "temperature": 0})
    base_says = said.json()["choices"][0]["text"] + "\n"
    assert done.stdout.endswith(base_says) and not done.stdout.startswith(base_says)
