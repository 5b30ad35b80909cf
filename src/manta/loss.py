"""The loss of the next token: from logits, or from hidden states and the output matrix at once.

Fused, logits are made for some rows at a time, and their gradients in the same pass, so that logits of all rows of a
large batch, the largest tensors of a step, are never there. On a GPU torch does it
(torch.nn.LinearCrossEntropyOptions). On a CPU that takes several times as long, since it sums a trained matrix's
gradient in float32; a frozen one's loss is computed here.
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

# At once: of more rows products are faster, up to some hundreds, and 128 MiB are little beside what a step holds.
_LOGITS = 2**25


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
        self.room: dict[torch.dtype, torch.Tensor] = {}

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
            total = _Frozen.apply(hidden, self.head.weight, self.head.bias, following, self._room(len(hidden)))
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

    def _room(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For logits as the head makes them and in float32, the same where that is the same. It is kept: the kernel
        gives new memory page by page, which takes as long as a softmax."""
        made = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.head.weight.dtype
        outputs = len(self.head.weight)
        rows = min(rows, max(_LOGITS // outputs // 64, 1) * 64)
        for dtype in {made, torch.float32}:
            if dtype not in self.room or len(self.room[dtype]) < rows:
                self.room[dtype] = torch.empty(rows, outputs, dtype=dtype)
        return self.room[made], self.room[torch.float32]


class _Frozen(torch.autograd.Function):
    """The sum of rows' losses, float32, of hidden states [rows, in] and an output matrix [out, in] not trained.

    The gradient of the hidden states is computed with it, and waits for the backward pass. `room` is for logits of some
    rows at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        following: torch.Tensor,
        room: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        states, weight = hidden.to(room[0].dtype), weight.to(room[0].dtype)
        for begin in range(0, len(hidden), len(room[0])):
            rows = slice(begin, begin + len(room[0]))
            trained, chosen = (following[rows] != IGNORE)[:, None], following[rows].clamp(min=0)
            logits, shifted = (each[: len(chosen)] for each in room)
            torch.mm(states[rows], weight.t(), out=logits)
            if bias is not None:
                logits += bias
            torch.sub(logits, logits.amax(-1, keepdim=True).float(), out=shifted)
            own = shifted.gather(1, chosen[:, None])
            sums = shifted.exp_().sum(-1, keepdim=True)
            total += ((sums.log() - own) * trained).sum()
            if ctx.needs_input_grad[0]:  # shares times outputs, less the output that follows
                shares = shifted if shifted.dtype == weight.dtype else logits.copy_(shifted)
                expected = torch.mm(shares, weight) / sums
                gradient[rows] = (expected - weight[chosen]) * trained
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None, None, None
