"""The loss of the next token: from logits, or from hidden states and the output matrix at once.

Fused, logits are made for some rows at a time, and their gradients in the same pass, so that logits of all rows, the
largest tensors of a step, are never there. On a GPU torch does it (torch.nn.LinearCrossEntropyOptions). On a CPU that
takes several times as long, since it sums a trained matrix's gradient in float32; a frozen one's loss is computed here.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear, linear_cross_entropy, log_softmax, pad

from manta import architecture
from manta.config import Config
from manta.data.tokenize import IGNORE
from manta.errors import UserError
from manta.model import Placement, adapted, base_of

_ROWS = 128  # at once: logits of so many stay in a CPU's cache


def check(config: Config) -> None:
    """Before a worker starts: raises UserError if the loss is to be fused and cannot be. Loads no weights."""
    if config.fused_loss == "on":
        bare = architecture.skeleton(config)
        settle(adapted(bare, config, Placement(torch.device("cpu"))), config, "cpu")


def settle(model: Any, config: Config, device: str) -> bool:
    """Whether the loss is fused, which it then is. Raises UserError if that was asked for and cannot be."""
    if config.fused_loss == "off" or config.use_liger_kernel:
        return False
    head = base_of(model).get_output_embeddings()
    obstacle = _obstacle(model)
    if obstacle is None and config.fused_loss == "auto" and device != "cuda" and _is_trained(head):
        return False
    if obstacle is None:
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


def _is_trained(head: torch.nn.Module) -> bool:
    return any(each.requires_grad for each in head.parameters())


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
        hidden, following = logits.reshape(-1, logits.shape[-1]), following.reshape(-1).to(logits.device)
        if hidden.device.type == "cpu" and not _is_trained(self.head):
            total = _Frozen.apply(hidden, self.head.weight, self.head.bias, following)
            return total / ((following != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)
        bias = self.head.bias
        loss = linear_cross_entropy(
            hidden,
            self.head.weight.to(hidden.dtype),
            following,
            linear_bias=None if bias is None else bias.to(hidden.dtype),
            reduction="mean" if num_items_in_batch is None else "sum",
            ignore_index=IGNORE,
            options=LinearCrossEntropyOptions(),
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch


class _Frozen(torch.autograd.Function):
    """The sum of rows' losses, float32, of hidden states [rows, in] and an output matrix [out, in] not trained.

    The gradient of the hidden states is computed with it, and waits for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, following: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for begin in range(0, len(hidden), _ROWS):
            rows = slice(begin, begin + _ROWS)
            trained = (following[rows] != IGNORE)[:, None]
            chosen = following[rows, None].clamp(min=0)
            logits = linear(hidden[rows], weight, bias)
            logs = log_softmax(logits, -1, dtype=torch.float32)
            total -= (logs.gather(1, chosen) * trained).sum()
            if ctx.needs_input_grad[0]:
                share = logs.exp_().scatter_add_(1, chosen, torch.full(chosen.shape, -1.0))
                gradient[rows] = torch.mm(torch.mul(share, trained, out=logits), weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.saved_tensors[0] * gradients[0], None, None, None
