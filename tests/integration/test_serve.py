"""A real `manta serve`, asked by OpenAI's own client, by `manta chat`, and by a browser."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from browser import browser, needs_browser
from served import KEY, Server, base, run_over, runs_flags, serving, until

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [f"{number} and 30 make" for number in range(8)]
PLACES = 80  # --max_concurrency


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("serve")
    base(where / "base")
    base(where / "plain", template=None, tie_word_embeddings=True, initializer_range=0.02)  # it never ends by itself
    return where


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Two adapters over one base, and weights of their own without a chat template."""
    runs = [run_over(folder / "base", folder / "results" / name, seed) for seed, name in enumerate(("red", "blue"))]
    flags = ["--model", str(folder / "plain"), "--max_concurrency", str(PLACES), "--max_body_bytes", "100000"]
    with serving(*runs_flags(runs), *flags) as up:
        yield up


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Any:
    """(model, prompt, tokens) → what transformers generates alone, for completions."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    models = {"base": AutoModelForCausalLM.from_pretrained(folder / "base")}
    for name in ("red", "blue"):
        weights = folder / "results" / name / "checkpoint_00000010" / "model"
        models[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), weights)

    def answer(name: str, prompt: str, tokens: int) -> str:
        batch = tokenizer(prompt, return_tensors="pt")
        out = models[name].generate(**batch, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def figure(server: Server, name: str) -> float:
    """The sum of a metric over its labels; `name` may hold some of them."""
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).text
    found = re.findall(
        rf"^{re.escape(name)}(?:\{{.*\}}|) (\S+)$" if "{" not in name else rf"^{name} (\S+)$", text, re.M
    )
    return sum(map(float, found))


def test_models_are_listed_by_name(client):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["base", "red", "blue", "plain"]
    assert client.models.retrieve("red").id == "red"
    assert [listed[name].manta["chat"] for name in listed] == [True, True, True, False]


def test_answers_are_those_of_the_model_that_was_named(client, greedy):
    texts = {}
    for name in ("base", "red", "blue"):
        done = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=12, temperature=0)
        texts[name] = done.choices[0].text
        assert texts[name] == greedy(name, PROMPTS[0], 12)
        assert done.usage.completion_tokens == 12 and done.usage.total_tokens == done.usage.prompt_tokens + 12
        assert done.choices[0].finish_reason == "length"
    assert len(set(texts.values())) == 3


def test_a_conversation_goes_through_the_chat_template(client, greedy):
    talk = [{"role": "system", "content": "Be short."}, *QUESTION, {"role": "assistant", "content": "Paris."}]
    talk.append({"role": "user", "content": [{"type": "text", "text": "And of "}, {"type": "text", "text": "Japan?"}]})
    done = client.chat.completions.create(model="red", messages=talk, max_tokens=10, temperature=0)
    text = (
        "system: Be short.\nuser: What is the capital of France?\nassistant: Paris.\nuser: And of Japan?\nassistant: "
    )
    assert done.choices[0].message.content == greedy("red", text, 10)
    assert done.choices[0].message.role == "assistant" and done.object == "chat.completion"


def test_a_stream_is_the_same_answer_in_pieces(client):
    asked: dict[str, Any] = {"model": "blue", "messages": QUESTION, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == whole.choices[0].message.content
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    assert len({event.id for event in events}) == 1 and len(events) > 5
    without = list(client.chat.completions.create(**asked, stream=True))
    assert all(event.usage is None and event.choices for event in without)


def test_stop_words_and_several_choices(client):
    asked: dict[str, Any] = {"model": "base", "prompt": PROMPTS[:2], "max_tokens": 24, "temperature": 0}
    whole = [choice.text for choice in client.completions.create(**asked).choices]
    assert len(whole) == 2 and whole[0] != whole[1]
    word = whole[0][6:8]
    stopped = client.completions.create(**asked, stop=[word, "never said"]).choices
    assert stopped[0].text == whole[0].partition(word)[0] and stopped[0].finish_reason == "stop"
    asked |= {"n": 2, "temperature": 1.0, "seed": 3}
    four = client.completions.create(**asked)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert four.choices[0].text != four.choices[1].text and four.usage.completion_tokens == 4 * 24
    pieces: dict[int, str] = {}
    for event in client.completions.create(**asked, stream=True):
        for choice in event.choices:
            pieces[choice.index] = pieces.get(choice.index, "") + choice.text
    assert [pieces[index] for index in range(4)] == [choice.text for choice in four.choices]


@pytest.mark.parametrize(
    ("change", "status", "code", "names"),
    [
        ({"model": "green"}, 404, "model_not_found", "blue"),
        ({"model": "plain"}, 400, "no_chat_template", "/v1/completions"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_value", "messages.0.role"),
        ({"max_tokens": 600}, 400, "context_length_exceeded", "512"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "context_length_exceeded", "512"),
        ({"logit_bias": {"5": 1}}, 400, "unsupported_parameter", "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter", "tools"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, 413, "request_too_large", "100000"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openais_form(client, change, status, code, names, stream):
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "red", "messages": QUESTION, "stream": stream, **change})
    assert (refused.value.status_code, refused.value.code) == (status, code)
    assert names in str(refused.value)


def test_a_key_is_asked_for_and_never_written(server, client):
    for wrong in ("sk-other", KEY + "x", "ü"):
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {wrong}".encode()})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-other", max_retries=0).models.list()
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "needs_key": True}
    written = [path for path in server.temporary.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert written == [] and not any(KEY.encode() in command for command in commands)
    assert KEY not in "".join(server.output)


def test_other_origins_and_other_names_are_kept_out(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    as_form = httpx.post(
        f"{server.url}/v1/completions", content=b"{}", headers={**headers, "Content-Type": "text/plain"}
    )
    assert as_form.status_code == 415
    renamed = httpx.post(f"{server.url}/v1/completions", json=body, headers={**headers, "Host": "evil.example"})
    assert renamed.status_code == 403 and renamed.json()["error"]["code"] == "host_not_allowed"
    broken = httpx.post(
        f"{server.url}/v1/completions", content=b"{", headers={**headers, "Content-Type": "application/json"}
    )
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "invalid_json"
    missing = httpx.get(f"{server.url}/v1/engines", headers=headers)
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"


def test_64_clients_at_once_get_what_each_gets_alone(server, greedy):
    """Base and adapters, streams and not, greedy and seeded, all in the same batches."""
    jobs = [(name, prompt) for prompt in PROMPTS for name in ("base", "red", "blue", "red")] * 2
    seeded: dict[str, Any] = {"model": "blue", "prompt": PROMPTS[3], "max_tokens": 16, "temperature": 1.2, "seed": 11}

    async def ask(number: int, name: str, prompt: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            if number % 8 == 7:
                return (await client.completions.create(**seeded)).choices[0].text
            asked: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": 8 + number % 5, "temperature": 0}
            if number % 2:
                return (await client.completions.create(**asked)).choices[0].text
            stream = await client.completions.create(**asked, stream=True)
            return "".join([event.choices[0].text async for event in stream])

    async def everybody() -> list[str]:
        return await asyncio.gather(*(ask(number, *job) for number, job in enumerate(jobs)))

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        alone = client.completions.create(**seeded).choices[0].text
    before = {name: figure(server, f'manta_engine{{figure="{name}",.*}}') for name in ("steps", "step_rows")}
    answers = asyncio.run(everybody())
    assert len(answers) == 64
    for number, ((name, prompt), text) in enumerate(zip(jobs, answers, strict=True)):
        assert text == (alone if number % 8 == 7 else greedy(name, prompt, 8 + number % 5)), (number, name)
    steps = figure(server, 'manta_engine{figure="steps",.*}') - before["steps"]
    rows = figure(server, 'manta_engine{figure="step_rows",.*}') - before["step_rows"]
    assert rows / steps > 4, "they shared steps"


def test_dropped_connections_free_their_places(server, client):
    cancelled = 'manta_requests_total{endpoint="completions",outcome="cancelled"}'
    before = figure(server, cancelled)
    long: dict[str, Any] = {"model": "plain", "prompt": "x", "max_tokens": 500, "temperature": 0}
    for _ in range(3):
        stream = client.completions.create(**long, n=4, stream=True)
        next(iter(stream))
        stream.close()

    async def leave() -> None:
        """One that waits for the whole answer."""
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as other:
            asking = asyncio.create_task(other.completions.create(**long, n=16))
            assert await asyncio.to_thread(until, lambda: figure(server, "manta_active_answers") >= 16)
            asking.cancel()

    asyncio.run(leave())
    assert until(lambda: figure(server, cancelled) == before + 4)
    assert until(lambda: figure(server, "manta_active_answers") == 0)
    assert until(lambda: figure(server, 'manta_engine{figure="running",.*}') == 0)


def test_beyond_the_limit_is_429_and_only_until_somebody_leaves(server, client):
    long: dict[str, Any] = {"model": "plain", "prompt": "x", "max_tokens": 500, "temperature": 0, "n": 16}

    async def crowd() -> openai.RateLimitError:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as others:
            asking = [asyncio.create_task(others.completions.create(**long)) for _ in range(PLACES // 16)]
            assert await asyncio.to_thread(until, lambda: figure(server, "manta_active_answers") == PLACES)
            with pytest.raises(openai.RateLimitError) as refused:
                await others.completions.create(model="base", prompt="x", max_tokens=1)
            for task in asking:
                task.cancel()
            return refused.value

    assert asyncio.run(crowd()).response.headers["retry-after"] == "1"
    assert until(lambda: figure(server, "manta_active_answers") == 0)
    assert client.completions.create(model="base", prompt="x", max_tokens=1).choices


def test_metrics_and_one_copy_of_the_weights(server, folder):
    assert figure(server, 'manta_tokens_total{kind="generated",model="red"}') > 0
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert set(re.findall(r'weights="([^"]+)"', text)) == {str(folder / "base"), str(folder / "plain")}
    assert 'manta_first_token_seconds_bucket{endpoint="chat.completions",le="+Inf"}' in text


def chat(server: Server, *arguments: str, said: str = "", key: str = KEY) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SOME_KEY": key}
    command = [sys.executable, "-m", "manta", "chat", "--url", server.url, "--api_key_env", "SOME_KEY", *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=100, env=env)


def test_chat_in_the_terminal(server, greedy):
    prompt = PROMPTS[0]
    done = chat(
        server, "--max_tokens", "6", said=f"{prompt}\n/base\n{prompt}\n/model plain\n/both\n{prompt}\n/quit\nx\n"
    )
    assert done.returncode == 0, done.stderr
    base_says, red_says = greedy("base", prompt, 6), greedy("red", prompt, 6)
    assert done.stdout == f"{red_says}\n{base_says}\nbase: {base_says}\nred: {red_says}\n"
    assert "asking plain" in done.stderr
    once = chat(server, "--max_tokens", "6", "--name", "blue", prompt)
    assert once.stdout == greedy("blue", prompt, 6) + "\n"
    for failed in (chat(server, "x", "--name", "green"), chat(server, "x", key="no")):
        assert failed.returncode == 2 and failed.stderr.startswith("manta: ") and "Traceback" not in failed.stderr


@needs_browser
def test_the_chat_page(server, greedy):
    with browser() as driver:
        from selenium.webdriver.common.keys import Keys

        driver.get(server.url)
        key = driver.find_element("id", "key")
        assert until(key.is_displayed)
        driver.switch_to.active_element.send_keys(KEY, Keys.TAB)  # the key's field has the focus
        assert until(lambda: driver.find_element("id", "left").get_attribute("value") == "base")
        assert driver.find_element("id", "right").get_attribute("value") == "red"
        assert driver.find_element("id", "mode").get_attribute("value") == "text"
        driver.find_element("id", "example").click()
        driver.execute_script("document.getElementById('tokens').value = 12")
        prompt = driver.switch_to.active_element
        assert prompt.get_attribute("id") == "prompt" and "capital of France" in prompt.get_attribute("value")
        text = prompt.get_attribute("value")
        prompt.send_keys(Keys.ENTER)
        assert until(lambda: len(driver.find_elements("css selector", ".answers h2 span:not(:empty)")) == 2)
        cards = driver.find_elements("css selector", ".answers section")
        for card, name in zip(cards, ("base", "red"), strict=True):
            assert card.find_element("tag name", "h2").text.startswith(name)
            assert "12 tokens" in card.find_element("tag name", "h2").text
            assert card.find_element("css selector", ".answer").get_property("textContent") == greedy(name, text, 12)
        lefts = [card.rect["x"] for card in cards]
        assert lefts[0] < lefts[1] and cards[0].rect["y"] == cards[1].rect["y"], "side by side"
        driver.execute_script("document.getElementById('tokens').value = 400")
        driver.switch_to.active_element.send_keys("12 and 30", Keys.ENTER)
        assert until(lambda: len(driver.find_elements("css selector", ".answers")) == 2)
        driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert until(lambda: driver.find_element("id", "send").is_enabled())
        assert driver.get_log("browser") == []
        assert KEY not in str(driver.execute_script("return JSON.stringify({...localStorage, ...sessionStorage})"))
    with browser("--force-dark-mode", width=390, height=844) as driver:
        driver.get(server.url)
        assert until(driver.find_element("id", "key").is_displayed)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert driver.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
        assert driver.get_log("browser") == []


def test_sigterm_finishes_what_is_under_way_and_refuses_the_rest(server, client):
    """The last one: the server ends."""
    asked: dict[str, Any] = {"model": "plain", "prompt": "x", "max_tokens": 500, "temperature": 0, "n": 4}
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    events = iter(stream)
    next(events)
    code: list[int] = []
    stopping = threading.Thread(target=lambda: code.append(server.stop()))
    stopping.start()

    def refused() -> bool:
        try:
            client.completions.create(model="base", prompt="x", max_tokens=1)
        except openai.InternalServerError as error:
            return error.status_code == 503 and error.code == "shutting_down"
        return False

    assert until(refused, 10)
    rest = list(events)
    assert rest[-1].usage.completion_tokens == 4 * 500
    stopping.join(100)
    assert code == [0] and "Traceback" not in "".join(server.output)
