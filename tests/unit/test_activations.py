"""What is computed again: the same gradients, as much memory as was estimated, and as little again as memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from manta import activations, attention, model
from manta.activations import Estimate
from manta.config import Config
from tiny import tiny_model

LENGTH = 96
ALL = ("none", "selective", "full")


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


def step(network: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and the bytes that autograd had saved by the end of the forward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(LENGTH)[None] % 90
    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = network(input_ids=ids, labels=ids, position_ids=torch.arange(LENGTH)[None]).loss
    loss.backward()
    return {name: each.grad for name, each in network.named_parameters()}, sum(kept.values())


def test_gradients_are_the_same_whatever_is_computed_again(config):
    gradients = {what: step(network_of(config, what))[0] for what in ALL}
    assert max(float(each.abs().max()) for each in gradients["none"].values()) > 1e-3
    for what in ("selective", "full"):
        for name, wanted in gradients["none"].items():
            assert torch.allclose(gradients[what][name], wanted, atol=1e-6), (what, name)


def test_selective_computes_no_product_of_matrices_again(config):
    """Counted: the products of a step are those without recomputation, and a layer's more where all is."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = {}
    for what in ALL:
        network = network_of(config, what)
        with FlopCounterMode(display=False) as counter:
            step(network)
        counted[what] = counter.get_total_flops()
    assert counted["selective"] == counted["none"]
    assert counted["full"] > 1.1 * counted["none"]


def test_the_estimate_is_what_autograd_saves(config):
    here = model.Placement(torch.device("cpu"))
    network = network_of(config, "none")
    found = activations.estimate(config, network, here, LENGTH)
    nothing = activations.estimate(config, network, here, 0)
    logits = LENGTH * network.get_output_embeddings().weight.shape[0] * 4
    _, saved = step(network)
    assert found is not None and nothing is not None
    per_step = found.none - nothing.none - 4 * logits  # the estimate counts a logit four times, autograd once or twice
    assert 0.8 < per_step / (saved - logits) < 1.5
    assert found.none > found.selective > found.full > nothing.full


def test_as_little_as_memory_allows_is_computed_again(config, monkeypatch):
    here = model.Placement(torch.device("cpu"))
    network = network_of(config, "none")
    for free, wanted in ((1 << 40, "none"), (0, "full")):
        monkeypatch.setattr(activations, "free_bytes", lambda placement, free=free: free)
        assert activations.settle(config, network, here, LENGTH)[0] == wanted
    needed = Estimate(none=100, selective=60, full=20)
    assert [needed.choose(free) for free in (200, 100, 50, 1)] == ["none", "selective", "full", "full"]
    asked = config.model_copy(update={"gradient_checkpointing": "selective"})
    assert activations.settle(asked, network, here, LENGTH) == ("selective", "as asked")


def test_free_memory_is_the_containers_where_that_is_less(tmp_path: Path, monkeypatch):
    here = model.Placement(torch.device("cpu"), world_size=4, nodes=2)
    whole = activations.free_bytes(model.Placement(torch.device("cpu")))
    assert whole > 1 << 20
    (tmp_path / "memory.max").write_text("4096\n")
    (tmp_path / "memory.current").write_text("1024\n")
    monkeypatch.setattr(activations, "_CGROUP", tmp_path)
    assert activations.free_bytes(here) == 3072 // 2
    (tmp_path / "memory.max").write_text("max\n")
    assert activations.free_bytes(here) > 4096
