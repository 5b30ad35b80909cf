"""A packed sequence is computed as its documents alone, by the models that Manta lets through; others it refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import library
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from manta import attention, model
from manta.attention import DOCUMENTS
from manta.config import Config
from manta.data.batches import MASKED, Layout, Rows, collate
from manta.data.packing import Packs, pack
from manta.data.tokenize import IGNORE
from manta.errors import UserError
from manta.loss import keeps_logits
from tiny import SIZES

VOCABULARY, CAPACITY, WINDOW = 96, 48, 6
HERE = model.Placement(torch.device("cpu"))
SHAPE = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # of the default size, attention hardly shows in the loss
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "llama": lambda: LlamaConfig(**SHAPE),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, output_router_logits=False),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, output_router_logits=False
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1
    ),
}
CASES = [
    *((name, attention) for name in MODELS for attention in ("sdpa", DOCUMENTS)),
    *((name, "eager") for name in ("qwen3", "gemma3", "gpt2")),
]


attention.register()


def made(config: Any, attention: str = "sdpa") -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    network.config.use_cache = False
    return network.eval()


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    """Documents of 2 … CAPACITY tokens, trained from a place in the first half, the first token always a label too."""
    drawn = np.random.default_rng(0)
    lengths = [*drawn.integers(2, 30, 14).tolist(), 2, CAPACITY, CAPACITY - 5]
    found = []
    for row, length in enumerate(lengths):
        ids = drawn.integers(1, VOCABULARY, length)
        labels = np.where(np.arange(length) < drawn.integers(0, length // 2 + 1), IGNORE, ids)
        labels[0] = ids[0]
        found.append({"input_ids": ids, "labels": labels, "row": row})
    return found


@pytest.fixture(scope="module")
def packs(samples: list[dict[str, Any]]) -> Packs:
    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    found = pack(lengths, np.arange(len(samples)), CAPACITY)
    assert max(len(found[index]) for index in range(len(found))) >= 3
    return found


def batch_of(rows: Rows, layout: Layout = "packed", picked: bool = False) -> dict[str, Any]:
    """All packs, and a fully masked row, in one batch: rows of several lengths, so that there is padding."""
    batch = collate([rows[index] for index in (*range(len(rows)), MASKED)], 0, layout, picked)
    assert len({len(rows[index]["input_ids"]) for index in range(len(rows))}) > 1
    return batch


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each target, float64: what is compared is the model, not the sum. Shape (batch, length - 1)."""
    each = cross_entropy(
        logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none"
    )
    return each.view(labels.shape[0], -1)


def packed_losses(network: Any, rows: Rows, hand_positions: bool = True) -> dict[int, float]:
    """Sample → summed loss of its tokens, as it stands in its pack."""
    batch = batch_of(rows)
    positions = batch["position_ids"]
    given = {"position_ids": positions} if hand_positions else {}
    with torch.no_grad():
        losses = loss_of(network(input_ids=batch["input_ids"], **given).logits, batch["labels"])
    documents = ((positions == 0).cumsum(1) - 1)[:, 1:]
    found = {
        sample: float(losses[row][documents[row] == number].sum())
        for row in range(len(rows))
        for number, sample in enumerate(rows.members(row))
    }
    assert sum(found.values()) == pytest.approx(float(losses.sum()), rel=1e-12)  # padding adds nothing
    return found


def losses_alone(network: Any, samples: list[dict[str, Any]]) -> dict[int, float]:
    with torch.no_grad():
        return {
            number: float(
                loss_of(
                    network(input_ids=torch.as_tensor(sample["input_ids"])[None]).logits,
                    torch.as_tensor(sample["labels"])[None],
                ).sum()
            )
            for number, sample in enumerate(samples)
        }


def gap(ours: dict[int, float], theirs: dict[int, float]) -> float:
    assert ours.keys() == theirs.keys()
    return max(abs(ours[sample] - theirs[sample]) for sample in ours)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_packed_document_has_the_loss_it_has_alone(name, attention, samples, packs):
    network, rows = made(MODELS[name](), attention), Rows(samples, packs)
    alone = losses_alone(network, samples)
    assert gap(packed_losses(network, rows), alone) <= 1e-5
    assert gap(packed_losses(network, rows, hand_positions=False), alone) > 0.1  # what a leak would look like


def test_the_window_of_gemmas_local_layers_matters_here(samples):
    """Else the test above would say nothing of local layers."""
    narrow = made(MODELS["gemma3"]())
    config = MODELS["gemma3"]()
    config.sliding_window = CAPACITY
    assert gap(losses_alone(narrow, samples), losses_alone(made(config), samples)) > 0.1


@pytest.mark.parametrize(
    ("layout", "attention", "picked"),
    [("packed", "sdpa", False), ("packed", "sdpa", True), ("joined", "sdpa", False), ("joined", DOCUMENTS, True)],
)
@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt2", "gemma3"])
def test_packed_gradients_are_those_of_the_documents_alone(name, layout, attention, picked, samples, packs):
    """Of the loss as the training loop has it: the sum over a step's tokens, by their number."""
    network, rows = made(MODELS[name](), attention), Rows(samples, packs)
    assert keeps_logits(network)
    batch = batch_of(rows, layout, picked)
    assert len(batch["input_ids"]) == (1 if layout == "joined" else len(rows) + 1)
    tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
    assert tokens == sum(int((sample["labels"][1:] != IGNORE).sum()) for sample in samples)

    given = {key: value for key, value in batch.items() if key not in ("rows", "tokens")}
    packed = network(**given, num_items_in_batch=tokens).loss
    packed.backward()
    ours = {key: parameter.grad.clone() for key, parameter in network.named_parameters()}
    network.zero_grad()
    total = 0.0
    for sample in samples:
        ids, labels = (torch.as_tensor(sample[key])[None] for key in ("input_ids", "labels"))
        loss = network(input_ids=ids, labels=labels, num_items_in_batch=tokens).loss
        loss.backward()
        total += float(loss.detach())
    theirs = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert float(packed.detach()) == pytest.approx(total, abs=1e-5)
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 0.01
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) <= 1e-5


def test_a_batch_that_trains_nothing_has_no_gradient():
    """As of a worker that has no part in a step: its other layers still need one, of zeros, for the others to sum."""
    network, rows = made(MODELS["qwen3"]()), Rows([])
    batch = collate([rows[MASKED]], 0, "joined", picked=True)
    loss = network(**{key: batch[key] for key in batch if key not in ("rows", "tokens")}, num_items_in_batch=5).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not parameter.grad.any() for parameter in network.parameters())


# --- The check that each worker makes before it trains on packed sequences


def config_of(attention: str = "sdpa", **settings: Any) -> Config:
    return Config(hf_model_id="a-model", packing=True, device="cpu", attn_implementation=attention, **settings)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_models_that_keep_documents_apart_pass(name, attention):
    network = made(MODELS[name](), attention).train()
    before = {key: parameter.clone() for key, parameter in network.named_parameters()}
    layout = model.settle_layout(network, config_of(attention), HERE)
    assert layout == ("joined" if attention == DOCUMENTS else "packed")
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], parameter) for key, parameter in network.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        FalconMambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2),
    ],
    ids=["bloom", "mamba"],
)
def test_models_that_know_no_positions_are_refused(config):
    with pytest.raises(UserError, match=r"a-model .*Leave out --packing"):
        model.settle_layout(made(config, "eager"), config_of("eager"), HERE)


def test_packs_seen_as_one_text_are_refused():
    """As by any attention implementation that makes its mask without a look at the positions."""
    AttentionInterface.register("blind", sdpa_attention_forward)
    AttentionMaskInterface.register("blind", lambda **about: None)  # sdpa's own causal mask is left
    for name in ("qwen3", "gpt2"):
        with pytest.raises(UserError, match="a packed document sees the one before it"):
            model.settle_layout(made(MODELS[name](), "blind"), config_of("blind"), HERE)


def test_an_attention_that_tells_documents_apart_in_one_row_only_is_refused_for_batches_of_several():
    """As transformers' flash attention does, which looks for documents only where the batch is one row."""

    def mask(batch_size: int, **about: Any) -> torch.Tensor | None:
        return sdpa_mask(batch_size=batch_size, **about) if batch_size == 1 else None

    AttentionInterface.register("one_row", sdpa_attention_forward)
    AttentionMaskInterface.register("one_row", mask)
    network = made(MODELS["qwen3"](), "one_row")
    model.settle_layout(network, config_of("one_row", per_device_train_batch_size=1), HERE)
    with pytest.raises(UserError, match="--per_device_train_batch_size 1"):
        model.settle_layout(network, config_of("one_row", per_device_train_batch_size=2), HERE)


def test_auto_pads_where_documents_see_each_other(monkeypatch):
    """An attention per document that does not look for documents, as of a model whose state runs on through a row."""
    monkeypatch.setattr(attention, "boundaries", lambda positions, length, device: (torch.tensor([0, length]), length))
    network = made(MODELS["qwen3"](), DOCUMENTS)
    with pytest.raises(UserError, match="sees the one before"):
        model.settle_layout(network, config_of(DOCUMENTS), HERE)
    config = Config(hf_model_id="a-model", device="cpu")
    assert model.settle_layout(network, config, HERE) == "padded"
    assert network.config._attn_implementation == "sdpa"


# --- Attention per document


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["heads", "grouped"])
def test_it_is_masked_attention_over_the_row(window, heads):
    torch.manual_seed(0)
    lengths = [7, 1, 12]
    query, key, value = (
        torch.randn(1, count, sum(lengths), 8, requires_grad=True) for count in (heads[0], *heads[1:] * 2)
    )
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    near = (place[:, None] - place[None]) < (window or 99)
    mask = (numbers[:, None] == numbers[None]) & (place[:, None] >= place[None]) & near
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    edges = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    for told in ({"position_ids": positions}, {"cu_seq_lens_q": edges, "max_length_q": 12}):
        found, _ = attention.documents(
            torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, **told
        )
        assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-6)
    ours = torch.autograd.grad(found.square().sum(), (query, key, value))
    theirs = torch.autograd.grad(wanted.square().sum(), (query, key, value))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_what_it_would_leave_out_is_refused():
    query = torch.randn(1, 2, 4, 8)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match="choose another"):
            attention.documents(torch.nn.Module(), query, query, query, None, **{name: torch.ones(2)})
    with pytest.raises(ValueError, match="to generate"):
        attention.documents(torch.nn.Module(), query[:, :, :1], query, query, None)
    assert not attention.serves(made(Gemma2Config(**SHAPE, attn_logit_softcapping=50.0), "eager"))
    assert attention.serves(made(MODELS["qwen3"](), "sdpa"))


@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 16), (8, 1, 80)], ids=str)
@pytest.mark.parametrize("lengths", [(1, 7, 130, 60), (300,), (128, 256, 16)], ids=str)
def test_products_in_bfloat16_are_as_near_to_exact_attention_as_torchs_own(shape, lengths):
    """Blocks of queries, several heads to a key, documents longer and shorter than a block; the backward pass too."""
    heads, shared, size = shape
    torch.manual_seed(0)
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    drawn = [torch.randn(1, sum(lengths), count, size).transpose(1, 2) for count in (heads, shared, shared)]
    back = torch.randn(1, sum(lengths), heads, size)

    def run(dtype: torch.dtype, implementation: Any) -> list[torch.Tensor]:
        leaves = [each.to(torch.bfloat16).to(dtype).requires_grad_() for each in drawn]
        found = implementation(*leaves)
        found.backward(back.to(torch.bfloat16).to(dtype))
        return [found.detach(), *(leaf.grad for leaf in leaves)]

    def one_by_one(q: Any, k: Any, v: Any) -> torch.Tensor:
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, enable_gqa=True
            )
            for a, b in pairwise(ends.tolist())
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    def ours(q: Any, k: Any, v: Any) -> torch.Tensor:
        return attention.documents(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=ends)[0]

    exact = run(torch.float64, one_by_one)
    torchs, found = run(torch.bfloat16, one_by_one), run(torch.bfloat16, ours)

    def gaps(those: list[torch.Tensor]) -> list[float]:
        return [float((one - wanted).norm() / wanted.norm()) for one, wanted in zip(those, exact, strict=True)]

    assert max(gaps(found)) <= 2 * max(gaps(torchs)) and max(gaps(found)) < 1e-2


def test_the_operator_is_told_to_compilers_as_it_is():
    """Shapes without values, gradients, and no argument that is changed: torch's own check of a custom operator."""
    given = [torch.randn(1, count, 40, 16, dtype=torch.bfloat16, requires_grad=True) for count in (4, 2, 2)]
    ends = torch.tensor([0, 15, 40], dtype=torch.int32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(attention.attend, (*given, ends, 0.25), test_utils=tests)
