"""What is computed again: the same gradients, and no product of matrices that need not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from manta import activations, attention
from manta.activations import ALL
from manta.config import Config
from tiny import tiny_model

LENGTH = 96


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("activations")
    if request.param == "qwen3":
        tiny_model(folder, num_hidden_layers=4)
    else:
        GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=128, n_embd=64, n_layer=4, n_head=2)).save_pretrained(
            folder
        )
    return Config(hf_model_id=str(folder), device="cpu", full_ft=True)


def network_of(config: Config, what: Any) -> Any:
    attention.register()
    network = AutoModelForCausalLM.from_pretrained(config.hf_model_id, attn_implementation=attention.DOCUMENTS).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    network.config.use_cache = False
    activations.recompute(network, what)
    return network


def gradients(network: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(LENGTH)[None] % 90
    network(input_ids=ids, labels=ids, position_ids=torch.arange(LENGTH)[None]).loss.backward()
    return {name: each.grad for name, each in network.named_parameters()}


def test_gradients_are_the_same_whatever_is_computed_again(config):
    found = {what: gradients(network_of(config, what)) for what in ALL}
    assert max(float(each.abs().max()) for each in found["none"].values()) > 1e-3
    for what in ("selective", "full"):
        for name, wanted in found["none"].items():
            assert torch.allclose(found[what][name], wanted, atol=1e-6), (what, name)


def test_selective_computes_no_product_of_matrices_again(config):
    """Counted: the products of a step are those without recomputation, and a layer's more where all is."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = {}
    for what in ALL:
        network = network_of(config, what)
        with FlopCounterMode(display=False) as counter:
            gradients(network)
        counted[what] = counter.get_total_flops()
    assert counted["selective"] == counted["none"]
    assert counted["full"] > 1.1 * counted["none"]
