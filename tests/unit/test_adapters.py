"""Adapters as they are trained compute what PEFT's compute, with less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from manta import activations, lora, model
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


class AsManta(torch.nn.Module):
    """In place of PEFT's dropout: Manta's own elements, drawn in the same order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = round(LORA["lora_dropout"] * 65536)
        kept = lora.keep(torch.randint(2**62, ()), x.shape, dropped)
        return x * kept * (65536 / (65536 - dropped))


def adapted(base: Any, **more: Any) -> Any:
    config = Config(
        hf_model_id="a-model", device="cpu", lora_rank=4, lora_alpha=6, lora_target_modules="all-linear", seed=3, **more
    )
    return model.adapted(base, config, Placement(torch.device("cpu")))


@pytest.mark.parametrize("dropout", [0.0, LORA["lora_dropout"]])
@pytest.mark.parametrize("name", BASES)
def test_the_same_loss_and_gradients_as_pefts(name, dropout):
    torch.manual_seed(0)
    base = BASES[name]()
    weights = {key: each.clone() for key, each in base.state_dict().items()}
    ours = adapted(base, lora_dropout=dropout)
    other = BASES[name]()
    other.load_state_dict(weights)
    torch.manual_seed(3)
    theirs = get_peft_model(other, LoraConfig(**LORA))
    for module in theirs.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = AsManta() if dropout else torch.nn.Identity()
    loss, found = step(ours)
    wanted_loss, wanted = step(theirs)
    assert loss == pytest.approx(wanted_loss, rel=1e-6) and found.keys() == wanted.keys()
    assert max(float(each.abs().max()) for each in wanted.values()) > 1e-3
    for key, each in wanted.items():
        assert torch.allclose(found[key], each, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("what", ["selective", "full"])
def test_what_is_computed_again_drops_the_same(what):
    torch.manual_seed(0)
    network = adapted(BASES["llama"](), lora_dropout=0.2)
    _, once = step(network)
    once = {name: each.clone() for name, each in once.items()}
    network.zero_grad()
    activations.recompute(network, what)
    _, again = step(network)
    assert all(torch.allclose(again[name], each, rtol=1e-5, atol=1e-7) for name, each in once.items())


def test_nothing_is_dropped_in_evaluation():
    torch.manual_seed(0)
    network = adapted(BASES["llama"](), lora_dropout=0.5)
    step(network)  # which leaves no B at zero
    ids = torch.arange(40)[None]
    dropping, *evaluating = (network.train(mode)(input_ids=ids).logits for mode in (True, False, False))
    assert torch.equal(*evaluating) and not torch.allclose(dropping, evaluating[0])


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5])
def test_elements_are_dropped_as_often_as_asked_and_by_themselves(probability):
    """Within five standard deviations, of all, of neighbours and of rows; other draws drop others."""
    rows, columns, dropped = 1000, 501, round(probability * 65536)  # no multiple of what one draw makes
    kept = lora.keep(torch.tensor(1), (rows, columns), dropped)
    again, others = (lora.keep(torch.tensor(seed), (rows, columns), dropped) for seed in (1, 2))
    assert set(kept.unique().tolist()) == {0, 1} and torch.equal(kept, again) and not torch.equal(kept, others)
    gone = 1 - kept.double()
    pairs = {"neighbours": gone[:, 1:] * gone[:, :-1], "rows": gone[1:] * gone[:-1], "others": gone * (1.0 - others)}
    for name, found, wanted in [("all", gone, probability), *((k, v, probability**2) for k, v in pairs.items())]:
        deviation = (wanted * (1 - wanted) / found.numel()) ** 0.5
        assert abs(float(found.mean()) - wanted) < 5 * deviation + 1e-5, name


def test_a_byte_of_an_element_is_kept_for_the_backward_pass():
    """What is saved with dropout and not without is a mask of each adapter's input; PEFT saves over five times that."""

    def saved(dropout: float, plain: bool = False) -> int:
        torch.manual_seed(0)
        network = adapted(BASES["llama"](), lora_dropout=dropout).train()
        for layer in (each for each in network.modules() if plain and isinstance(each, LoraLayer)):
            layer.lora_variant.clear()
        sizes: dict[int, int] = {}
        alive = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            alive.append(tensor)
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.arange(40)[None]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(input_ids=ids, labels=ids)
        return sum(sizes.values())

    layers = [each for each in adapted(BASES["llama"]()).modules() if isinstance(each, LoraLayer)]
    elements = 40 * sum(layer.in_features for layer in layers)
    assert elements <= saved(0.2) - saved(0.0) < 1.1 * elements  # and A of the first layer
    assert saved(0.2, plain=True) - saved(0.0, plain=True) > 5 * elements


def test_an_adapter_with_a_bias_is_left_to_peft():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4))
    network = lora.lean(get_peft_model(base, LoraConfig(**LORA, lora_bias=True)), torch.float32)
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    assert layers and not any(layer.lora_variant for layer in layers)


def test_what_is_scaled_is_narrow():
    """No product with the scale of what has a row for each token, as PEFT has it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Multiplied(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.by_number: list[tuple[int, ...]] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(function).startswith("aten.mul.") and not isinstance(args[1], torch.Tensor):
                self.by_number.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    network = adapted(BASES["llama"](), lora_dropout=0.2)
    with Multiplied() as multiplied:
        step(network)
    of_a = [shape for shape in multiplied.by_number if shape[0] == 4]
    assert len(of_a) == 2 * sum("lora_A" in name for name, _ in network.named_parameters())
    assert (1, 40, SIZES["intermediate_size"]) not in multiplied.by_number
