"""Adapters as they are trained compute what PEFT's compute, with less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from manta import model
from manta.config import Config
from manta.model import Placement
from tiny import SIZES

BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)),
}
LORA = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def step(network: Any) -> tuple[float, dict[str, torch.Tensor]]:
    for name, each in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(each, 0.1)
    ids = torch.arange(40)[None]
    torch.manual_seed(1)  # of dropout
    loss = network.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {name: each.grad for name, each in network.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("name", BASES)
def test_the_same_loss_and_gradients_as_pefts(name):
    torch.manual_seed(0)
    base = BASES[name]()
    weights = {key: each.clone() for key, each in base.state_dict().items()}
    config = Config(
        hf_model_id="a-model", device="cpu", lora_rank=4, lora_alpha=6, lora_dropout=0.2,
        lora_target_modules="all-linear", seed=3,
    )  # fmt: skip
    ours = model.adapted(base, config, Placement(torch.device("cpu")))
    other = BASES[name]()
    other.load_state_dict(weights)
    torch.manual_seed(3)
    theirs = get_peft_model(other, LoraConfig(**LORA))
    loss, found = step(ours)
    wanted_loss, wanted = step(theirs)
    assert loss == pytest.approx(wanted_loss, rel=1e-6) and found.keys() == wanted.keys()
    assert max(float(each.abs().max()) for each in wanted.values()) > 1e-3
    for key, each in wanted.items():
        assert torch.allclose(found[key], each, rtol=1e-4, atol=1e-6), key


def test_what_is_scaled_is_narrow():
    """No product of a layer's whole output with the scale, as PEFT has it: found by the shapes that are multiplied."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Multiplied(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.by_number: list[int] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(function).startswith("aten.mul.") and not isinstance(args[1], torch.Tensor):
                self.by_number.append(args[0].shape[-1])
            return function(*args, **(kwargs or {}))

    config = Config(
        hf_model_id="a-model", device="cpu", lora_rank=4, lora_dropout=0.0, lora_target_modules="all-linear"
    )
    network = model.adapted(BASES["llama"](), config, Placement(torch.device("cpu")))
    with Multiplied() as multiplied:
        step(network)
    assert multiplied.by_number.count(4) == 2 * sum("lora_A" in name for name, _ in network.named_parameters())
    assert SIZES["intermediate_size"] not in multiplied.by_number
