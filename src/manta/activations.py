"""What of the forward pass is kept for the backward pass: all of it, the products of matrices, or each layer's input.

What is not kept is computed again, which costs up to a third of a step, so memory is what decides. It is estimated by
running the model without storage and counting what autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from manta import architecture, checkpoint, model
from manta.config import Config
from manta.model import Placement

Recomputed = Literal["none", "selective", "full"]  # as the config says it

_PROBE = 64  # tokens: long enough to tell a layer's share, short enough that no square of it counts
_LOGIT_BYTES = 16  # a logit in half precision, its float32, its softmax, and the gradients of the first two
_SHARE = 0.7  # of what is free: allocators fragment, and a spare process or a checkpoint being written wants some too
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Estimate:
    """Bytes that a step needs beside the weights, by what is computed again."""

    none: int
    selective: int
    full: int

    def choose(self, free: int) -> Recomputed:
        """The fastest of the three that fits into `free` bytes; the smallest if none does."""
        fits = _SHARE * free
        return "none" if self.none <= fits else "selective" if self.selective <= fits else "full"


def settle(config: Config, network: Any, placement: Placement, tokens: int) -> tuple[Recomputed, str]:
    """What is computed again, the same on all ranks, and why. `tokens` is the size of the largest micro-batch."""
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing, "as asked"
    needed = estimate(config, network, placement, tokens)
    if needed is None:
        return "full", "its memory cannot be estimated"
    free = min(checkpoint.gather(free_bytes(placement)))
    needed = max(checkpoint.gather(needed), key=lambda each: each.none)
    chosen = needed.choose(free)
    return chosen, f"{getattr(needed, chosen) / 2**30:.1f} of {free / 2**30:.1f} GiB for {tokens:,} tokens"


def estimate(config: Config, network: Any, placement: Placement, tokens: int) -> Estimate | None:
    """For micro-batches of at most `tokens` tokens of the model `network` was built from.

    None for a model that cannot run without storage, such as a mixture of experts, whose routing reads values.
    """
    bare: Any = architecture.skeleton(config)
    bare.to(placement.dtype)
    try:
        saved, products = _saved(bare), _products(bare)
    except (NotImplementedError, RuntimeError):
        return None
    layers = max(1, len(model.layer_names(bare)))
    inputs = layers * bare.config.get_text_config().hidden_size * placement.dtype.itemsize
    fixed = _optimizer_bytes(network, placement)
    vocabulary = bare.get_output_embeddings().weight.shape[0]
    logits = tokens * vocabulary * _LOGIT_BYTES
    again = saved / layers  # one layer at a time is computed anew
    return Estimate(
        none=int(fixed + logits + tokens * saved),
        selective=int(fixed + logits + tokens * (inputs + products + again)),
        full=int(fixed + logits + tokens * (inputs + again)),
    )


def free_bytes(placement: Placement) -> int:
    """What this worker can still have: of its GPU, or its part of the node's memory or of the container's."""
    if placement.device.type == "cuda":
        return torch.cuda.mem_get_info(placement.device)[0]
    free = psutil.virtual_memory().available
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return free * placement.nodes // placement.world_size


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
    """Matrix products and attention of torch's own: most of the arithmetic, in few tensors."""
    library, name, *_ = str(operator).split(".")
    attends = name.startswith(("_scaled_dot_product", "_varlen_attn", "_flash_attention_forward"))
    return library in ("aten", "torch_attn") and (attends or name in ("mm", "addmm", "bmm"))


def _saved(bare: Any) -> float:
    """Bytes per token that autograd saves between the embeddings and the logits, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in bare.parameters()}
    storages: dict[int, torch.Tensor] = {}  # alive until counted: a dead storage's address is used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage()._cdata) not in own:
            storages[address] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        _forward(bare)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / _PROBE


def _products(bare: Any) -> float:
    """Bytes per token of what matrices give, and of attention, which is as large as a layer's input."""
    sizes: list[int] = []

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        sizes.append(output.numel() * output.element_size())

    others = (bare.get_input_embeddings(), bare.get_output_embeddings())
    matrices = [each for each in bare.modules() if getattr(getattr(each, "weight", None), "ndim", 0) == 2]
    handles = [each.register_forward_hook(note) for each in matrices if each not in others]
    try:
        with torch.no_grad():
            _forward(bare)
    finally:
        for handle in handles:
            handle.remove()
    hidden = bare.config.get_text_config().hidden_size * bare.dtype.itemsize
    return sum(sizes) / _PROBE + len(model.layer_names(bare)) * hidden


def _forward(bare: Any) -> Any:
    tokens = torch.zeros(1, _PROBE, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, _PROBE, _PROBE, dtype=torch.bool, device="meta")  # whole, or the library looks at values
    return bare(input_ids=tokens, attention_mask=mask, logits_to_keep=1, use_cache=False).logits


def _optimizer_bytes(network: Any, placement: Placement) -> int:
    """Gradients and Adam's two moments of what is trained here, a copy of it for a checkpoint, and autocast's casts."""
    trained = sum(
        getattr(each.data, "to_local", lambda each=each: each.data)().numel()
        for each in network.parameters()
        if each.requires_grad
    )
    return trained * (4 + 8 + 12 + (2 if placement.dtype == torch.bfloat16 else 0))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
