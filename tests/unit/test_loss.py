"""A fused loss is the loss, with the gradients it has; where something lies between, it is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from manta import loss, memory
from manta.config import Config
from manta.data.tokenize import IGNORE
from manta.errors import UserError
from manta.model import Placement
from manta.simulation import Shape
from running import small_config
from tiny import SIZES

VOCABULARY = 300
SHAPE = {**SIZES, "vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PLAIN = {
    "qwen3, tied": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SHAPE),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, output_router_logits=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **NO_DROPOUT
    ),
}
CHANGED = {
    "gemma2": lambda: Gemma2Config(**SHAPE),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=8.0),
    "cohere": lambda: CohereConfig(
        **{name: size for name, size in SHAPE.items() if name != "head_dim"}, eos_token_id=1
    ),
}


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def asked(how: str, **settings: Any) -> Config:
    return Config(hf_model_id="the-model", fused_loss=how, **settings)


def batch(picked: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 40))
    labels = torch.where(torch.arange(40) < 25, IGNORE, ids)
    found: dict[str, Any] = {"input_ids": ids, "labels": labels, "use_cache": False}
    if picked:
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)[:1]
        keep = following != IGNORE
        found |= {"input_ids": ids[:1], "labels": labels[:1], "logits_to_keep": keep[0].nonzero()[:, 0]}
        found["shift_labels"] = following[keep][None]
    return found


def gradients(network: Any, given: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    network.zero_grad()
    found = network(**given).loss
    found.backward()
    return float(found.detach()), {
        name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None
    }


@pytest.mark.parametrize("tokens", [None, 45], ids=["mean", "by the tokens of a step"])
@pytest.mark.parametrize("picked", [False, True], ids=["all", "picked"])
@pytest.mark.parametrize("name", PLAIN)
def test_loss_and_gradients_are_the_same(name, picked, tokens):
    network = made(PLAIN[name]())
    given = batch(picked) | ({} if tokens is None else {"num_items_in_batch": torch.tensor(tokens)})
    whole, wanted = gradients(network, given)
    assert loss.settle(network, asked("on"), "cpu") and loss.keeps_logits(network)
    fused, found = gradients(network, given)
    assert fused == pytest.approx(whole, rel=1e-5) and found.keys() == wanted.keys()
    largest = max(float(each.abs().max()) for each in wanted.values())
    assert largest > 0.01
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-5 * max(largest, 1)
    with torch.no_grad():
        assert float(network(**given).loss) == pytest.approx(whole, rel=1e-5)


def test_adapters_learn_alike_and_a_frozen_head_gets_no_gradient():
    network = get_peft_model(made(PLAIN["qwen3, tied"]()), LoraConfig(target_modules="all-linear", r=4))
    for name, each in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.1)
    _, wanted = gradients(network, batch(False))
    fused = copy.deepcopy(network)
    assert loss.settle(fused, asked("auto"), "cuda")  # what is chosen; computed here
    _, found = gradients(fused, batch(False))
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found)
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-5


def test_a_frozen_heads_loss_on_a_cpu_is_that_of_its_logits(monkeypatch):
    """More rows than are taken at once, some not trained; with adapters, whose gradients are compared."""
    monkeypatch.setattr(loss, "_LOGITS", 64 * VOCABULARY)
    network = get_peft_model(made(PLAIN["llama"]()), LoraConfig(target_modules="all-linear", r=4))
    given = {name: each.repeat(1, 5) for name, each in batch(False).items() if name != "use_cache"}
    before, wanted = gradients(network, given)
    assert loss.settle(network, asked("auto"), "cpu")
    after, found = gradients(network, given)
    assert after == pytest.approx(before, rel=1e-5) and found.keys() == wanted.keys()
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-5


def test_bfloat16_is_as_near_to_float32_as_with_logits():
    exact = made(PLAIN["llama"]())
    _, wanted = gradients(exact, batch(False))
    network = made(PLAIN["llama"]())

    def far() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            _, found = gradients(network, batch(False))
        return float((found["lm_head.weight"] - wanted["lm_head.weight"]).norm() / wanted["lm_head.weight"].norm())

    before = far()
    assert loss.settle(network, asked("on"), "cpu")
    assert far() <= 1.5 * before


@pytest.mark.parametrize("name", CHANGED)
def test_what_lies_between_is_seen(name):
    network = made(CHANGED[name]())
    assert not loss.settle(network, asked("auto"), "cuda")
    with pytest.raises(UserError, match="the-model cannot be fused: it changes its logits"):
        loss.settle(network, asked("on"), "cpu")


def test_it_is_seen_before_a_worker_starts(tmp_path):
    made(CHANGED["granite"]()).save_pretrained(tmp_path / "granite")
    plain = small_config(tmp_path, fused_loss="on")
    loss.check(plain)
    for update in ({"hf_model_id": str(tmp_path / "granite")}, {"lora_target_modules": "lm_head"}):
        with pytest.raises(UserError, match="cannot be fused"):
            loss.check(plain.model_copy(update=update))


def test_an_adapter_on_the_head_is_seen():
    network = get_peft_model(made(PLAIN["llama"]()), LoraConfig(target_modules=["lm_head"], r=4))
    with pytest.raises(UserError, match="has an adapter"):
        loss.settle(network, asked("on"), "cpu")


@pytest.mark.parametrize(("how", "device", "more"), [("auto", "cpu", {}), ("off", "cuda", {}),
                                                     ("auto", "cuda", {"use_liger_kernel": True})])  # fmt: skip
def test_logits_stay_where_they_are_wanted(how, device, more):
    network = made(PLAIN["llama"]())
    assert not loss.settle(network, asked(how, **more), device)
    assert network(**batch(False)).logits.shape[-1] == VOCABULARY


def test_the_estimate_of_memory_knows(tmp_path, monkeypatch):
    """A step without storage has no logits of all rows in it; the vocabulary is what is wide here."""
    monkeypatch.setattr(loss, "_LOGITS", 2**14)
    plain = small_config(tmp_path)
    placement, shape = Placement(torch.device("cpu"), 1), Shape(1, 400)
    whole = memory.estimate(plain.model_copy(update={"fused_loss": "off"}), placement, shape, "none")
    fused = memory.estimate(plain, placement, shape, "none")
    assert whole and fused and fused.logits == 0 < whole.logits
    assert fused.total - fused.held < whole.total - whole.held  # what the heap holds is not the same twice
