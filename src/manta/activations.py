"""What of the forward pass is kept for the backward pass: all of it, the products of matrices, or each layer's input.

What is not kept is computed again, which costs up to a third of a step, so memory is what decides; see `memory`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recomputed = Literal["none", "selective", "full"]  # as the config says it, the fastest first
ALL: tuple[Recomputed, ...] = ("none", "selective", "full")


def recompute(network: Any, what: Recomputed) -> None:
    """Make the model's layers compute this again in the backward pass."""
    if what == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    network.activation_checkpointing_enable(options)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_product(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_product(operator: Any) -> bool:
    """Matrix products, and attention of torch's own or Manta's: most of the arithmetic, in few tensors."""
    library, name, *_ = str(operator).split(".")
    attends = name.startswith(("_scaled_dot_product", "_varlen_attn", "_flash_attention_forward", "attend"))
    return library in ("aten", "torch_attn", "manta") and (attends or name in ("mm", "addmm", "bmm"))
