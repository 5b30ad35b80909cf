"""What of the forward pass is kept for the backward pass: all of it, the products of matrices, or each layer's input.

What is not kept is computed again, which costs up to a third of a step, so memory is what decides; see `memory`. Where
nothing has to be, a gated MLP still keeps its two projections alone: what follows of them is as wide, and soon made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recomputed = Literal["none", "selective", "full"]  # as the config says it, the fastest first
ALL: tuple[Recomputed, ...] = ("none", "selective", "full")

_GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
_FORWARDS = [  # of transformers' models, over a hundred
    f"def forward(self, x): return {_GATED}".split(),
    f"def forward(self, x): down_proj = {_GATED} return down_proj".split(),
]


def recompute(network: Any, what: Recomputed) -> None:
    """Make the model's layers compute this again in the backward pass."""
    if what == "none":
        for module in network.modules():
            if _is_gated(module.__class__):
                module.forward = MethodType(_gated, module)
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    network.activation_checkpointing_enable(options)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_product(operator, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_product(operator: Any, args: Any) -> bool:
    """Matrix products, and attention of torch's own or Manta's: most of the arithmetic, in few tensors. Not a product
    that is added to a matrix of its size: an adapter's, of few terms, beside the one that it is added to."""
    library, name, *_ = str(operator).split(".")
    attends = name.startswith(("_scaled_dot_product", "_varlen_attn", "_flash_attention_forward", "attend"))
    multiplies = name in ("mm", "bmm") or (name == "addmm" and args[0].dim() == 1)
    return library in ("aten", "torch_attn", "manta") and (attends or multiplies)


@cache
def _is_gated(kind: type[torch.nn.Module]) -> bool:
    try:
        return inspect.getsource(kind.forward).split() in _FORWARDS
    except (OSError, TypeError):  # made while running, or not in Python
        return False


def _gated(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of such an MLP, of which the projections of `x` are kept, and the same values made of them again."""
    if torch.compiler.is_compiling():  # it decides itself what it keeps
        return type(mlp).forward(mlp, x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    active = mlp.act_fn(gate)
    with _made_again(active, lambda: mlp.act_fn(gate)):
        product = active * up
    with _made_again(product, lambda: mlp.act_fn(gate) * up):
        return mlp.down_proj(product)


def _made_again(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> saved_tensors_hooks:
    """While it is entered, what is to be kept of `tensor` or its views is only how to `make` it."""
    storage, size = tensor.untyped_storage()._cdata, tensor.numel()  # `tensor` itself would be kept with `pack`

    def pack(kept: torch.Tensor) -> Any:
        whole = kept.untyped_storage()._cdata == storage and kept.numel() == size
        return kept.shape if whole and kept.is_contiguous() else kept

    def unpack(kept: Any) -> torch.Tensor:
        with torch.no_grad():
            return make().view(kept) if isinstance(kept, torch.Size) else kept

    return saved_tensors_hooks(pack, unpack)
