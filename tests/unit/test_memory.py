"""Memory part by part: what is alive in a step without storage is what is alive in a real one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from manta import activations, architecture, attention, fit, loss, memory, model
from manta.config import Config
from manta.heap import Heap
from manta.model import Placement
from manta.probe import resident
from manta.simulation import Shape
from tiny import tiny_model

LENGTH = 96
HERE = Placement(torch.device("cpu"))


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("memory")
    if request.param == "qwen3":
        return tiny_model(folder, num_hidden_layers=4)
    shape = GPT2Config(vocab_size=96, n_positions=128, n_embd=64, n_layer=4, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    return str(folder)


def config_of(folder: str, **settings: Any) -> Config:
    return Config(**{"hf_model_id": folder, "device": "cpu", "gradient_accumulation_steps": 1, **settings})


class Alive(TorchDispatchMode):
    """Bytes of what operators made and something still refers to, and the most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self.known:
                storage = each.untyped_storage()
                self.known[storage._cdata] = weakref.ref(storage, self.ended(storage._cdata, storage.nbytes()))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return result

    def ended(self, address: int, size: int) -> Callable[[Any], None]:
        def end(_: Any) -> None:
            self.now -= size
            del self.known[address]

        return end


def really(config: Config, what: Any, dtype: torch.dtype) -> int:
    """The most bytes alive in a real step of the model, beside its parameters."""
    attention.register()
    placement = Placement(torch.device("cpu"), dtype=dtype)
    network = model.build(config.model_copy(update={"attn_implementation": attention.DOCUMENTS}), placement).train()
    loss.settle(network, config, "cpu")
    activations.recompute(network, what)
    own = {each.untyped_storage()._cdata: None for each in (*network.parameters(), *network.buffers())}
    ids = torch.arange(LENGTH)[None] % 90
    alive = Alive()
    alive.known.update(own)
    with alive:
        with model.autocast(placement):
            found = network(input_ids=ids, labels=ids, shift_labels=ids, position_ids=torch.arange(LENGTH)[None])
        found_loss = found.loss
        del found
        found_loss.backward()
    return alive.most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", activations.ALL)
@pytest.mark.parametrize("full_ft", [True, False], ids=["full", "lora"])
def test_a_step_without_storage_has_as_much_alive_as_a_real_one(folder, full_ft, what, dtype):
    config = config_of(folder, full_ft=full_ft, lora_target_modules="all-linear", lora_rank=8)
    found = memory.estimate(config, Placement(torch.device("cpu"), dtype=dtype), Shape(1, LENGTH), what)
    assert found is not None
    alive = found.activations + found.logits + found.casts + found.gradients
    assert alive == pytest.approx(really(config, what, dtype), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full_ft", [True, False], ids=["full", "lora"])
def test_the_bound_from_few_layers_is_above_the_estimate_and_not_far(full_ft, dtype, tmp_path):
    model_of = tiny_model(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    config = config_of(model_of, full_ft=full_ft, lora_target_modules="all-linear", lora_rank=8)
    placement = Placement(torch.device("cpu"), 2, dtype=dtype)
    for shape in (Shape(1, 2048), Shape(4, 16, "padded")):
        found, bound = memory.estimate(config, placement, shape, "none"), memory.at_most(config, placement, shape)
        assert found is not None and bound is not None
        without = found.beside_weights - found.held
        assert without <= bound.beside_weights - bound.held <= 1.5 * without
        assert found.beside_weights <= bound.beside_weights


def test_there_is_no_bound_for_layers_that_differ(tmp_path):
    from transformers import AutoModelForCausalLM

    plain = tiny_model(tmp_path / "plain", num_hidden_layers=4)
    network = AutoModelForCausalLM.from_pretrained(plain)
    assert model.has_layers_alike(network)
    network.model.layers[2].mlp.up_proj = torch.nn.Linear(8, 8)
    assert not model.has_layers_alike(network)


def test_the_less_is_kept_the_less_is_needed(folder):
    config = config_of(folder, full_ft=True)
    needed = [memory.estimate(config, HERE, Shape(1, LENGTH), what).activations for what in activations.ALL]
    assert needed[0] > needed[1] > needed[2] > 0
    assert memory.estimate(config, HERE, Shape(1, 2 * LENGTH), "none").activations > 1.7 * needed[0]


def test_what_stands_still_follows_from_shapes(folder):
    size = sum(each.numel() for each in architecture.skeleton(config_of(folder)).parameters())
    full = memory.estimate(config_of(folder, full_ft=True), HERE, Shape(1, LENGTH), "none")
    assert full.weights == pytest.approx(4 * size, rel=0.01) and full.optimizer == 8 * size
    assert full.adapters == 0 and full.copies == 12 * size
    one = config_of(folder, full_ft=True, gradient_accumulation_steps=4)
    four = Placement(torch.device("cpu"), 4)
    divided = memory.estimate(one, four, Shape(1, LENGTH), "none")
    assert divided.weights == pytest.approx(size, rel=0.01) and divided.optimizer == 2 * size
    assert divided.gradients == pytest.approx(size, rel=0.01)  # float32, of this worker's shard
    lora = config_of(folder, lora_target_modules="all-linear", lora_rank=8)
    half = memory.estimate(lora, Placement(torch.device("cpu"), dtype=torch.bfloat16), Shape(1, LENGTH), "none")
    assert half.weights == pytest.approx(2 * size, rel=0.01)
    assert half.optimizer == 2 * half.adapters > 0  # two moments, both as large as what is trained


def test_the_optimizers_state_is_tried():
    assert memory.optimizer_bytes(Config()) == 8
    assert memory.optimizer_bytes(Config(optim="sgd")) == 0
    assert 0 < memory.optimizer_bytes(Config(optim="adafactor")) < 1
    assert memory.optimizer_bytes(Config(optim="no_such_optimizer")) == 8


def test_the_largest_micro_batch_is_as_it_is_laid_out():
    lengths = np.array([5, 9, 7, 2])
    assert memory.largest(lengths, 2, "joined") == Shape(1, 16, "joined")
    assert memory.largest(lengths, 2, "padded") == Shape(2, 9, "padded")


def _about(mebibytes: int) -> int:
    """The heap's own first page may have been there before."""
    return (mebibytes << 20) - (1 << 16)


def test_a_heap_holds_at_least_what_is_alive_and_gives_it_back():
    heap = Heap()
    pieces = [heap.take(3 << 20) for _ in range(8)]
    if heap.most == 0:
        pytest.skip("the C library is not glibc")
    assert _about(24) <= heap.most < 28 << 20
    before = resident()
    for piece in pieces[::2]:
        heap.give(piece)
    heap.take(5 << 20)  # fits into no hole
    assert heap.most >= _about(28)
    assert resident() - before < 1 << 20  # addresses, and no memory
    heap.close()


def test_a_model_that_reads_values_is_not_estimated(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    config = config_of(str(tmp_path), full_ft=True)
    found = memory.estimate(config, HERE, Shape(1, 32), "none")
    settled = fit.settle(config, HERE, Shape(1, 32), fit.Room(1 << 40, 1 << 40))
    assert settled.recomputed == ("none" if found else "full")
    assert found is None or memory.at_most(config, HERE, Shape(1, 32)) is None  # two layers are none to go on from
