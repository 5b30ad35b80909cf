"""What is computed again: the same gradients, and no product of matrices that need not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from manta import activations, attention, model
from manta.activations import ALL
from manta.config import Config
from manta.model import Placement
from manta.simulation import Shape, passes
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


def network_of(config: Config, what: Any = None) -> Any:
    attention.register()
    network = AutoModelForCausalLM.from_pretrained(config.hf_model_id, attn_implementation=attention.DOCUMENTS).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    network.config.use_cache = False
    if what:
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


@pytest.mark.parametrize("kind", ["full", "lora", "dropout", "bfloat16"])
def test_a_gated_mlp_keeps_two_tensors_less_and_gradients_are_the_same_to_the_last_bit(kind, tmp_path):
    config = Config(
        hf_model_id=tiny_model(tmp_path, num_hidden_layers=4, hidden_size=64, intermediate_size=256),
        device="cpu",
        full_ft=kind == "full",
        lora_rank=4,
        lora_dropout=0.5 if kind == "dropout" else 0.0,
        lora_target_modules="all-linear",
    )
    placement = Placement(torch.device("cpu"), dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)

    def trained(what: Any) -> dict[str, torch.Tensor]:
        network = model.adapted(network_of(config), config, placement).train()
        with torch.no_grad():  # an adapter's B begins as zeros, behind which no gradient comes through
            for name, each in network.named_parameters():
                if "lora_B" in name:
                    each.copy_(torch.linspace(-1, 1, each.numel()).view_as(each))
        if what:
            activations.recompute(network, what)
        torch.manual_seed(1)  # of dropout
        with model.autocast(placement):
            found = gradients(network)
        return {name: each for name, each in found.items() if each is not None}

    plain, kept = trained(None), trained("none")
    assert plain.keys() == kept.keys()
    assert min(float(each.abs().max()) for each in plain.values()) > 0
    for name, wanted in plain.items():
        assert torch.equal(kept[name], wanted), name

    forward = []
    for what in (None, "none"):
        network = model.adapted(network_of(config), config, placement).train()
        if what:
            activations.recompute(network, what)
        both = passes(network, placement, Shape(1, LENGTH))
        assert both is not None
        forward.append(both[0]["activations"])
    tensor = LENGTH * 256 * placement.dtype.itemsize
    assert forward[0] - forward[1] == pytest.approx(2 * 4 * tensor, rel=0.3)


def test_selective_keeps_the_product_of_an_adapted_layer_once(tmp_path):
    """What the adapter adds is made again: kept as well, it would be as large as what it is added to."""
    folder = tiny_model(tmp_path, num_hidden_layers=4)
    kept = []
    for full_ft in (True, False):
        config = Config(hf_model_id=folder, full_ft=full_ft, lora_rank=2, lora_target_modules="all-linear")
        placement = Placement(torch.device("cpu"))
        network = model.adapted(network_of(config), config, placement).train()
        activations.recompute(network, "selective")
        both = passes(network, placement, Shape(1, LENGTH))
        assert both is not None
        kept.append(both[0]["activations"])
    assert kept[1] < 1.2 * kept[0]
