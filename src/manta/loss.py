"""The loss of the next token: from logits, or from hidden states and the output matrix at once.

Fused, torch makes logits for some rows at a time, and their gradients in the same pass, so that logits of all rows, the
largest tensors of a step, are never there (torch.nn.LinearCrossEntropyOptions). It pays on a GPU, which waits for
memory; a CPU accumulates such products in float32, several times slower than it multiplies bfloat16.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy, pad

from manta import architecture
from manta.config import Config
from manta.data.tokenize import IGNORE
from manta.errors import UserError
from manta.model import Placement, adapted, base_of


def check(config: Config) -> None:
    """Before a worker starts: raises UserError if the loss is to be fused and cannot be. Loads no weights."""
    if config.fused_loss == "on":
        bare = architecture.skeleton(config)
        settle(adapted(bare, config, Placement(torch.device("cpu"))), config, "cpu")


def settle(model: Any, config: Config, device: str) -> bool:
    """Whether the loss is fused, which it then is. Raises UserError if that was asked for and cannot be."""
    if config.fused_loss == "off" or config.use_liger_kernel or (config.fused_loss == "auto" and device != "cuda"):
        return False
    if (obstacle := _obstacle(model)) is None:
        _fuse(base_of(model))
    elif config.fused_loss == "on":
        raise UserError(f"The loss of {config.hf_model_id} cannot be fused: {obstacle}. Leave out --fused_loss.")
    return obstacle is None


def keeps_logits(model: Any) -> bool:
    """Whether logits can be computed for trained positions alone: the library's usual forward and loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    base = base_of(model)
    usual = base.loss_function is ForCausalLMLoss or isinstance(base.loss_function, _Fused)
    return usual and "logits_to_keep" in inspect.signature(base.forward).parameters


def _obstacle(model: Any) -> str | None:
    """What lies between the output matrix and the loss; None if nothing does."""
    base = base_of(model)
    if not keeps_logits(base):
        return "it has a forward or a loss of its own"
    if type(base.get_output_embeddings()) is not torch.nn.Linear:
        return "its output matrix is not a plain one, or has an adapter"
    made = re.findall(r"\blogits = (\S+)", inspect.getsource(type(base).forward))
    at_once = len(made) == 1 and made[0].startswith("self.lm_head(")
    return None if at_once else "it changes its logits, by a scale or a soft cap"


def _fuse(base: Any) -> None:
    head = base.get_output_embeddings()
    head.forward = _unchanged  # what the model takes for logits are then hidden states
    base.loss_function = _Fused(head)


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


class _Fused:
    """In place of transformers' ForCausalLMLoss, with its arguments, for hidden states (…, in) of a head (out, in)."""

    def __init__(self, head: torch.nn.Linear):
        self.head = head

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        following = pad(labels, (0, 1), value=IGNORE)[..., 1:] if shift_labels is None else shift_labels
        hidden = logits.reshape(-1, logits.shape[-1])
        bias = self.head.bias
        loss = linear_cross_entropy(
            hidden,
            self.head.weight.to(hidden.dtype),
            following.reshape(-1).to(hidden.device),
            linear_bias=None if bias is None else bias.to(hidden.dtype),
            reduction="mean" if num_items_in_batch is None else "sum",
            ignore_index=IGNORE,
            options=LinearCrossEntropyOptions(),
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch
