"""The model as it fits: whether a frozen base is sharded, and what is computed again, follow from free memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import psutil
import torch

from manta import activations, architecture, checkpoint, memory, model
from manta.activations import Recomputed
from manta.config import Config
from manta.data.batches import Layout
from manta.memory import Memory, at_most, estimate
from manta.model import Placement
from manta.simulation import Shape

_SHARE = 0.7  # of what is free: allocators fragment, and a spare process wants some too
_CGROUP = Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Bytes that the worker with least can have before its model is loaded, on its device and of its host's memory."""

    device: int
    host: int


@dataclass(frozen=True)
class Settled:
    """What `auto` stands for: settings without it, why, and what is needed then, if that had to be known."""

    config: Config
    why: str
    needed: Memory | None = None

    @property
    def recomputed(self) -> Recomputed:
        return cast(Recomputed, self.config.gradient_checkpointing)


def room(placement: Placement) -> Room:
    """What there is now. All ranks call it."""
    host = replace(placement, device=torch.device("cpu"))
    found = checkpoint.gather((free_bytes(placement), free_bytes(host)))
    return Room(*(min(each) for each in zip(*found, strict=True)))


def build(
    config: Config, placement: Placement, sequences: np.ndarray, weights: Path | None = None
) -> tuple[Any, Layout, Settled]:
    """The model to train, as `model.build` makes it; how samples become a batch; what was settled. All ranks call it.

    `sequences` are the lengths of all that is trained on, in tokens.
    """
    attention = model.attention_of(config, placement.device.type, architecture.skeleton(config))
    usual, there = model.usual_layout(attention, config), room(placement)

    def settled_for(layout: Layout, config: Config) -> Settled:
        """By rank 0 for all: what a heap holds is not the same twice, and ranks that disagree wait for ever."""
        shape = memory.largest(sequences, config.per_device_train_batch_size, layout)
        first = checkpoint.rank() == 0
        return checkpoint.gather(settle(config, placement, shape, there, quick=True) if first else None)[0]

    settled = settled_for(usual, config)
    network = model.build(settled.config, placement, weights)
    model.assert_sharded(network, settled.config, placement)
    layout = model.settle_layout(network, config, placement)
    if layout != usual:
        as_loaded = {"sharding_strategy": settled.config.sharding_strategy}
        settled = settled_for(layout, config.model_copy(update=as_loaded))
    activations.recompute(network, settled.recomputed)
    return network, layout, settled


def settle(config: Config, placement: Placement, shape: Shape, there: Room, quick: bool = False) -> Settled:
    """What `sharding_strategy` and `gradient_checkpointing` stand for, where `there` is this room.

    A frozen base stays whole on each worker if it fits there with all the rest and nothing is computed again for it:
    only gradients of adapters travel then. What is trained is sharded. With `quick`, what is needed is first looked for
    as an upper bound, which is soon known.
    """
    asked = config.gradient_checkpointing
    first: Recomputed = "none" if asked == "auto" else asked

    def needs(tried: Config, what: Recomputed) -> Memory | None:
        bound = at_most(tried, placement, shape) if quick and what == first else None
        return bound if bound and fits(bound, there.device) else estimate(tried, placement, shape, what)

    def settled(tried: Config, what: Recomputed, needed: Memory | None) -> Settled:
        return Settled(tried.model_copy(update={"gradient_checkpointing": what}), _why(needed, there, shape), needed)

    if config.sharding_strategy == "auto":
        whole, sharded = (config.model_copy(update={"sharding_strategy": name}) for name in ("NO_SHARD", "FULL_SHARD"))
        if placement.world_size == 1:
            return settle(whole, placement, shape, there, quick)
        if not config.full_ft and not config.fsdp_cpu_offload:
            needed = needs(whole, first)
            if needed and fits(needed, there.device) and needed.weights <= _SHARE * there.host:
                return settled(whole, first, needed)
        return settle(sharded, placement, shape, there, quick)
    if asked != "auto":
        return Settled(config, "as asked")
    return settled(config, *choose(lambda what: needs(config, what), there.device))


def choose(needs: Callable[[Recomputed], Memory | None], free: int) -> tuple[Recomputed, Memory | None]:
    """What is computed again with `free` bytes before there are weights, and what is needed then.

    The fastest of the three that fits; the smallest if none does. `needs` is asked only as far as necessary.
    """
    everything = needs("none")
    if everything is None:
        return "full", None
    if fits(everything, free):
        return "none", everything
    least = needs("full")
    if least is not None and fits(least, free) and (some := needs("selective")) is not None and fits(some, free):
        return "selective", some
    return "full", least


def fits(needed: Memory, free: int) -> bool:
    """Whether it does into `free` bytes, most of which are there beside the weights, some of which stay free."""
    return needed.beside_weights <= _SHARE * (free - needed.weights - needed.adapters)


def _why(needed: Memory | None, there: Room, shape: Shape) -> str:
    if needed is None:
        return "its memory cannot be estimated"
    beside = max(0, there.device - needed.weights - needed.adapters)
    return f"{needed.beside_weights / 2**30:.1f} of {beside / 2**30:.1f} GiB for {shape.tokens:,} tokens"


def free_bytes(placement: Placement) -> int:
    """What this worker can still have: of its GPU, or its part of the node's memory or of the container's."""
    if placement.device.type == "cuda":
        return torch.cuda.mem_get_info(placement.device)[0]
    free = psutil.virtual_memory().available
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return free * placement.nodes // placement.world_size


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
