"""LoRA with less work than PEFT makes of it: no casts of wide inputs, narrow scales, and dropout that a CPU can afford.

For dropout torch draws a number for each element of an adapter's input, on a CPU one after the other, and keeps the
mask and the product with it. What is saved: benchmarks/micro.py, test_adapters.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import library
from torch.nn.functional import linear

_LEVELS = 2**16  # of a probability: what two random bytes tell apart


def lean(model: Any, dtype: torch.dtype) -> Any:
    """`model`, its adapters of linear layers computed here. `dtype` is that of the forward pass: casts are left to
    autocast, which would undo PEFT's own of each input to float32 at once."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and dtype != torch.float32:
            cast(Any, module).cast_input_dtype_enabled = False
        if type(module) is Linear:
            for adapter in module.lora_A:
                if not module.lora_bias.get(adapter):
                    module.lora_variant.setdefault(adapter, cast(Any, _Lean))
    return model


class _Lean:
    """What PEFT calls a LoraVariant (peft/tuners/lora/layer.py), which has what the base layer made of `x`, `result`.

    All scales are those of A, `rank` rows; PEFT has one behind B, over all of a layer's output, forward and backward.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        dropout, scale, dropped = module.lora_dropout[active_adapter], module.scaling[active_adapter], 0
        x = x.to(result.dtype)
        if x.device.type == "cpu" and module.training and isinstance(dropout, torch.nn.Dropout):
            dropped = min(round(dropout.p * _LEVELS), _LEVELS - 1)
            scale *= _LEVELS / (_LEVELS - dropped)
        down = (module.lora_A[active_adapter].weight * scale).to(x.dtype)
        up = module.lora_B[active_adapter].weight.to(x.dtype)
        if dropped:
            inner = _OfKept.apply(x, keep(torch.randint(2**62, (), device="cpu"), x.shape, dropped), down)
        else:
            inner = linear(dropout(x), down)
        return torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up.t()).view(result.shape)


@library.custom_op("manta::keep", mutates_args=(), device_types="cpu")
def keep(seed: torch.Tensor, shape: Sequence[int], dropped: int) -> torch.Tensor:
    """1 for what dropout keeps and 0 for the rest, uint8; of `dropped` elements in 65,536 the rest.

    `seed`, an integer, tells all of it. Four elements are of one draw of SFC64 (Chris Doty-Humphrey, PractRand), and
    integers of one byte multiply faster than booleans.
    """
    mask = torch.empty(list(shape), dtype=torch.uint8)
    drawn = np.random.SFC64(int(seed)).random_raw(-(-mask.numel() // 4)).view(np.uint16)
    np.greater_equal(drawn[: mask.numel()], dropped, out=mask.view(torch.bool).numpy().reshape(-1))
    return mask


@keep.register_fake
def _(seed: torch.Tensor, shape: Sequence[int], dropped: int) -> torch.Tensor:
    return seed.new_empty(list(shape), dtype=torch.uint8)


class _OfKept(torch.autograd.Function):
    """`(x * kept) @ weight.T` of [..., in], the same, and [out, in]; `x * kept` is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, kept, weight)
        return linear(x * kept, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, kept, weight), (given,) = ctx.saved_tensors, gradients
        of_x = torch.matmul(given, weight).mul_(kept) if ctx.needs_input_grad[0] else None
        return of_x, None, torch.mm(given.flatten(0, -2).t(), (x * kept).flatten(0, -2))
