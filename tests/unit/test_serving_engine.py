"""The transformers engine: what a request gets must not depend on what runs beside it."""

from __future__ import annotations

import asyncio
import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from manta.errors import UserError
from manta.serving.batch import BASE, Batch, adapter_names, load
from manta.serving.generation import Delta, EngineError, Request, Sampling
from manta.serving.sampling import Answer, draw
from manta.serving.scheduler import Limits, TransformersEngine
from served import base

PROMPTS = ["Question: what is", "The sum of two numbers", "def add(a, b):\n", "Paris", "### Input:\n12 and 30\n### "]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("engine")
    base(where / "base")
    for seed, (name, targets) in enumerate({"red": ["q_proj", "v_proj"], "blue": "all-linear"}.items()):
        torch.manual_seed(seed)
        plain = AutoModelForCausalLM.from_pretrained(where / "base")
        config = LoraConfig(r=4 * (seed + 1), target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(plain, config).save_pretrained(where / name)
    return where


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(str(folder / "base"), adapters(folder), torch.float32, CPU, False)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "base")


def adapters(folder: Path) -> dict[str, str]:
    return {name: str(folder / name) for name in ("red", "blue")}


def engine_of(model: Any, tokenizer: Any, **limits: int) -> TransformersEngine:
    return TransformersEngine(model, tokenizer, adapter_names({"red": "", "blue": ""}), Limits(**limits))


def request(tokenizer: Any, text: str, model: str = "base", stops: Any = (), **rule: Any) -> Request:
    rule = {"max_tokens": 12, "temperature": 0.0, **rule}
    return Request(model, tokenizer(text)["input_ids"], Sampling(**rule), frozenset(stops))


async def answer(engine: TransformersEngine, asked: Request, delay: float = 0.0) -> Delta:
    await asyncio.sleep(delay)
    whole = Delta()
    async for delta in engine.generate(asked):
        whole += delta
    return whole


@functools.cache
def reference(folder: Path, name: str) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(folder / "base")
    return plain if name == "base" else PeftModel.from_pretrained(plain, folder / name)


def by_transformers(folder: Path, name: str, tokenizer: Any, text: str, count: int) -> str:
    """Greedy, alone, by `generate`."""
    model = reference(folder, name)
    batch = tokenizer(text, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_answers_of_a_mixed_batch_are_those_of_generate(folder, model, tokenizer):
    """Base and two adapters in one batch; requests of uneven length join and leave at different tokens."""
    engine = engine_of(model, tokenizer, rows=6)
    draws = random.Random(0)
    asked = [(name, text, draws.randrange(3, 24)) for text in PROMPTS for name in ("base", "red", "blue")]

    async def all_of_them() -> list[Delta]:
        return await asyncio.gather(
            *(
                answer(engine, request(tokenizer, text, name, max_tokens=count), draws.random() / 10)
                for name, text, count in asked
            )
        )

    given = asyncio.run(all_of_them())
    stats = asyncio.run(engine.stats())
    engine.close()
    for (name, text, count), whole in zip(asked, given, strict=True):
        assert whole == Delta(by_transformers(folder, name, tokenizer, text, count), count, "length"), (name, text)
    assert stats["step_rows"] / stats["steps"] > 2, "they ran together"


def test_a_seed_gives_the_same_answer_alone_and_beside_others(model, tokenizer):
    engine = engine_of(model, tokenizer)
    rule = {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "max_tokens": 20}
    seeded = [request(tokenizer, text, "red", seed=5, **rule) for text in PROMPTS]

    async def crowd() -> list[Delta]:
        others = [request(tokenizer, text, "blue", **rule) for text in PROMPTS * 2]
        tasks = [answer(engine, each, number * 0.002) for number, each in enumerate(seeded + others)]
        return (await asyncio.gather(*tasks))[: len(seeded)]

    alone = [asyncio.run(answer(engine, each)) for each in seeded]
    assert asyncio.run(crowd()) == alone
    other = [asyncio.run(answer(engine, request(tokenizer, t, "red", seed=6, **rule))) for t in PROMPTS]
    unseeded = {asyncio.run(answer(engine, request(tokenizer, PROMPTS[0], **rule))).text for _ in range(5)}
    engine.close()
    assert other != alone and len(unseeded) > 1


def test_limits_hold_and_who_has_to_wait_again_goes_on_with_the_same_answer(model, tokenizer):
    """Rows grow out of 90 tokens in the middle of their answers; a request that is longer still runs alone."""
    engine = engine_of(model, tokenizer, rows=3, tokens=90)
    rule = {"temperature": 0.9, "seed": 4, "max_tokens": 30}
    alone = asyncio.run(answer(engine, request(tokenizer, PROMPTS[4], **rule)))
    seen = []

    async def crowd() -> list[Delta]:
        tasks = [asyncio.create_task(answer(engine, request(tokenizer, PROMPTS[4], **rule))) for _ in range(9)]
        tasks.append(asyncio.create_task(answer(engine, request(tokenizer, "Paris", max_tokens=200))))
        while not all(task.done() for task in tasks):
            seen.append((await engine.stats())["running"])
            await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks)

    joined = asyncio.run(engine.stats())["joined"]
    given = asyncio.run(crowd())
    again = asyncio.run(engine.stats())["joined"] - joined - len(given)
    engine.close()
    assert given[:-1] == [alone] * 9 and given[-1].tokens == 200
    assert 1 < max(seen) <= 3 and again > 0


def test_who_leaves_frees_the_place_at_the_next_token(model, tokenizer):
    engine = engine_of(model, tokenizer, rows=1)

    async def leave_and_ask() -> Delta:
        stream = engine.generate(request(tokenizer, "Paris", max_tokens=100_000))
        await anext(stream)
        waiting = asyncio.create_task(answer(engine, request(tokenizer, "Paris", max_tokens=100_000)))
        await asyncio.sleep(0.05)
        waiting.cancel()  # one that has not begun
        await stream.aclose()
        return await asyncio.wait_for(answer(engine, request(tokenizer, "Paris")), 20)

    assert asyncio.run(leave_and_ask()).tokens == 12
    stats = asyncio.run(engine.stats())
    engine.close()
    assert stats["joined"] == 2 and stats["waiting"] == 0


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(model, tokenizer, monkeypatch):
    engine = engine_of(model, tokenizer)
    wrong = Request("base", [10**6], Sampling(5))  # no such row of the embedding
    with pytest.raises(EngineError, match="IndexError"):
        asyncio.run(answer(engine, wrong))
    assert asyncio.run(answer(engine, request(tokenizer, "Paris"))).tokens == 12
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(answer(engine, request(tokenizer, "Paris")))


def test_stop_words_end_an_answer_before_them_and_are_never_shown_in_part(model, tokenizer):
    engine = engine_of(model, tokenizer)
    whole = asyncio.run(answer(engine, request(tokenizer, "Paris", max_tokens=30))).text
    word = whole[len(whole) // 2 :][:3]

    async def pieces() -> list[Delta]:
        return [delta async for delta in engine.generate(request(tokenizer, "Paris", max_tokens=30, stop=(word,)))]

    told = asyncio.run(pieces())
    engine.close()
    assert "".join(delta.text for delta in told) == whole[: whole.index(word)]
    assert [delta.finish for delta in told][-1] == "stop" and {delta.finish for delta in told[:-1]} <= {None}


def test_stop_tokens_count_and_do_not_show(tokenizer):
    asked = request(tokenizer, "Paris", stops=[tokenizer.eos_token_id])
    ids = tokenizer("naïve 🙂")["input_ids"]
    writing = Answer(tokenizer.backend_tokenizer, asked)
    told = [writing.add(token) for token in [*ids, tokenizer.eos_token_id]]
    assert "".join(delta.text for delta in told) == "naïve 🙂"
    assert all("�" not in delta.text for delta in told)
    assert told[-1].finish == "stop" and writing.tokens == len(ids) + 1


def test_padding_of_those_who_left_is_cut_out(model, tokenizer):
    batch = Batch(model)
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    batch.join(ids, [BASE] * len(ids))
    shortest = min(range(len(ids)), key=lambda row: len(ids[row]))
    batch.keep([shortest])
    assert batch._mask.shape == (1, len(ids[shortest])) and bool(batch._mask.all())
    assert batch._cache.layers[0].keys.shape[2] == len(ids[shortest])


def test_draws_follow_the_rule():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    chances = [(number + 0.5) / 1000 for number in range(1000)]

    def shares(**rule: Any) -> list[float]:
        sampling = Sampling(1, **rule)
        tokens = draw(logits.repeat(1000, 1), [sampling] * 1000, chances)
        return [tokens.count(token) / 1000 for token in range(4)]

    assert shares(temperature=1.0) == pytest.approx(logits.exp()[0].tolist(), abs=0.002)
    assert shares(temperature=0.5) == pytest.approx((2 * logits).softmax(-1)[0].tolist(), abs=0.002)
    assert shares(temperature=0.0) == [1, 0, 0, 0]
    assert shares(top_k=2) == pytest.approx([*logits[0, :2].softmax(-1).tolist(), 0, 0], abs=0.002)
    assert shares(top_p=0.7)[2:] == [0, 0] and shares(top_p=0.6) == [1, 0, 0, 0]
    assert shares(top_p=1e-9) == [1, 0, 0, 0]
    assert draw(logits, [Sampling(1)], [1 - 2**-53]) == [3]


def test_a_model_with_another_state_than_keys_and_values_is_refused(tmp_path):
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="--engine vllm"):
        load(str(tmp_path / "mamba"), {}, torch.float32, CPU, False)
