"""What a worker's memory is for, part by part, before there is a weight; and what is computed again for want of it.

What stands still (weights, optimizer, buffers of FSDP, copies) follows from shapes; what comes and goes in a step is
counted by running it without storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from manta import architecture, attention, checkpoint, loss, model
from manta.activations import Recomputed, recompute
from manta.config import Config
from manta.data.batches import Layout, most_tokens
from manta.model import Placement
from manta.simulation import LARGE, Shape, simulate

_SHARE = 0.7  # of what is free: allocators fragment, and a spare process wants some too
# Threads, kernels' buffers and modules that are imported late, on a CPU: benchmarks/results/*-plan.md.
RUNTIME = 52 * 2**20
_CGROUP = Path("/sys/fs/cgroup")
_ADAM = 8  # bytes of optimizer state per trained parameter where the optimizer cannot be tried


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker when most are in use, by what they are for; on CUDA, of its GPU.

    weights: this worker's part of the base. gathered: layers that FSDP makes whole for a moment, or DDP's buckets.
    casts: half-precision copies of float32 weights. held: by a CPU's heap, of what was freed. copies: a checkpoint
    that is being written, in host memory.
    """

    weights: int
    adapters: int
    optimizer: int
    gathered: int
    gradients: int
    activations: int
    logits: int
    casts: int
    held: int
    copies: int

    @property
    def standing(self) -> int:
        """There all the time."""
        return self.weights + self.adapters + self.optimizer

    @property
    def step(self) -> int:
        """The most of a step, without a checkpoint."""
        return self.standing + self.gathered + self.gradients + self.activations + self.logits + self.casts + self.held

    @property
    def total(self) -> int:
        return self.step + self.copies

    @property
    def resident(self) -> int:
        """What the system will count for the most of a step, beside what the imports take."""
        return self.step + RUNTIME

    @property
    def beside_weights(self) -> int:
        """What a worker still wants whose model is loaded."""
        return self.total - self.weights - self.adapters


def settle(config: Config, placement: Placement, shape: Shape) -> tuple[Recomputed, str]:
    """What is computed again, the same on all ranks, and why; asked when the model is loaded.

    The fastest of the three that fits into what is free; the smallest if none does.
    """
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing, "as asked"
    free = min(checkpoint.gather(free_bytes(placement)))
    what, needed = choose(lambda what: estimate(config, placement, shape, what), free)
    if needed is None:
        return "full", "its memory cannot be estimated"
    return what, f"{needed.beside_weights / 2**30:.1f} of {free / 2**30:.1f} GiB for {shape.tokens:,} tokens"


def choose(needs: Callable[[Recomputed], Memory | None], free: int) -> tuple[Recomputed, Memory | None]:
    """What `auto` stands for with `free` bytes beside the weights, and what is needed then.

    `needs` is asked only as far as necessary.
    """

    def fits(needed: Memory) -> bool:
        return needed.beside_weights <= _SHARE * free

    everything = needs("none")
    if everything is None:
        return "full", None
    if fits(everything):
        return "none", everything
    least = needs("full")
    if least is not None and fits(least) and (some := needs("selective")) is not None and fits(some):
        return "selective", some
    return "full", least


def largest(lengths: np.ndarray, batch: int, layout: Layout) -> Shape:
    """The largest micro-batch of `batch` sequences there can be."""
    tokens = most_tokens(lengths, batch, layout)
    return Shape(1, tokens, layout) if layout == "joined" else Shape(batch, tokens // batch, layout)


def estimate(config: Config, placement: Placement, shape: Shape, what: Recomputed) -> Memory | None:
    """For micro-batches of `shape`, where `what` is computed again. Loads no weights.

    None for a model that cannot run without storage.
    """
    network = bare_network(config, placement, shape)
    recompute(network, what)
    standing = _standing(config, network, placement)
    shards, several = _shards(config, placement), accumulates(config, placement)
    if (step := simulate(network, placement, shape, several, shards, optimizer_bytes(config))) is None:
        return None
    offloaded = config.fsdp_cpu_offload and placement.device.type != "cpu"
    return replace(
        standing,
        gradients=0 if offloaded else step.gradients,
        activations=step.activations,
        logits=step.logits,
        casts=step.casts,
        held=step.held,
    )


def bare_network(config: Config, placement: Placement, shape: Shape) -> Any:
    """The model as it is trained, without storage: dtypes, adapters, attention."""
    bare: Any = architecture.skeleton(config)
    bare.to(torch.float32 if config.full_ft and _shards(config, placement) == 1 else placement.dtype)
    attention.register()
    asked = config.attn_implementation
    plain = "sdpa" if asked in ("auto", attention.DOCUMENTS) or asked.startswith("flash") else asked
    bare.set_attn_implementation(attention.DOCUMENTS if shape.layout == "joined" else plain)
    with torch.random.fork_rng(devices=[]):
        network = model.adapted(bare, config, placement).train()
    loss.settle(network, config, placement.device.type)
    return network


def accumulates(config: Config, placement: Placement) -> bool:
    """Whether a worker's step has several micro-batches, so that gradients are there beside activations."""
    return config.micro_batches(placement.world_size) > placement.world_size


def free_bytes(placement: Placement) -> int:
    """What this worker can still have: of its GPU, or its part of the node's memory or of the container's."""
    if placement.device.type == "cuda":
        return torch.cuda.mem_get_info(placement.device)[0]
    free = psutil.virtual_memory().available
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return free * placement.nodes // placement.world_size


def _shards(config: Config, placement: Placement) -> int:
    if config.sharding_strategy == "NO_SHARD":
        return 1
    return placement.world_size // (placement.nodes if config.sharding_strategy == "HYBRID_SHARD" else 1)


def _standing(config: Config, network: Any, placement: Placement) -> Memory:
    """What follows from shapes alone."""
    shards, cuda = _shards(config, placement), placement.device.type != "cpu"
    parameters = dict(network.named_parameters())
    base = {name: each for name, each in parameters.items() if not model.is_adapter(name)}
    adapters = {name: each for name, each in parameters.items() if name not in base}
    held = sum(each.numel() * (4 if config.full_ft else each.element_size()) for each in base.values()) // shards
    held += sum(each.nbytes for each in network.buffers())
    trained = sum(each.numel() for each in base.values()) // shards if config.full_ft else 0
    trained += sum(each.numel() for each in adapters.values())
    state = optimizer_bytes(config)
    offloaded = cuda and config.fsdp_cpu_offload and shards > 1
    return Memory(
        weights=0 if offloaded else held,
        adapters=sum(each.nbytes for each in adapters.values()),
        optimizer=0 if offloaded and config.full_ft else int(trained * state),
        gathered=_gathered(config, network, placement, shards, base),
        gradients=0,
        activations=0,
        logits=0,
        casts=0,
        held=0,
        copies=0 if cuda else int(trained * (4 + state)) * (2 if config.step_copies == "every" else 1),
    )


def _gathered(config: Config, network: Any, placement: Placement, shards: int, base: dict[str, Any]) -> int:
    """Whole weights and gradients that FSDP2 holds for a moment, or DDP's buckets.

    The root's own (embeddings, output) stay whole from forward to backward; of the layers, one computes while the next
    one is gathered (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
    """
    if shards == 1:  # Ray Train makes a process group for one worker, too, and then the library has DDP
        return sum(each.numel() * 4 for each in network.parameters() if each.requires_grad)
    units = model.layer_names(network)
    sizes = dict.fromkeys(units, 0)
    root = 0
    for name, each in base.items():
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), None)
        if unit is None:
            root += each.numel()
        else:
            sizes[unit] += each.numel()
    whole = [root, *sizes.values()]
    half = placement.dtype.itemsize
    if placement.device.type == "cpu":
        return _copied(whole, half, 3.5) + (_copied(whole, 4, 1.25) if config.full_ft else 0)
    largest = max(sizes.values(), default=0)
    layers = sum(sizes.values()) if config.sharding_strategy == "SHARD_GRAD_OP" else 2 * largest
    gathered = (root + layers) * half
    if config.full_ft:  # a unit's gradients, and the float32 buffer that is reduced
        gathered += max(root, largest) * (half + 4)
    return gathered


def _copied(units: list[int], width: int, copies: float) -> int:
    """What gloo's collectives take on a CPU for `units` of so many elements of `width` bytes.

    Those under LARGE stay as several copies in the heaps of its threads, one unit's beside the other's; of larger ones
    two are there at once. The number of copies is fitted to six measured shapes, benchmarks/results/*-plan.md.
    """
    sizes = sorted(unit * width for unit in units)
    return int(copies * sum(size for size in sizes if size < LARGE)) + sum(
        [each for each in sizes if each >= LARGE][-2:]
    )


def optimizer_bytes(config: Config) -> float:
    """Bytes of state per trained parameter that the optimizer keeps, tried on a matrix."""
    from transformers import Trainer, TrainingArguments

    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=config.optim, use_cpu=True))
        matrix = torch.nn.Parameter(torch.zeros(64, 64))
        matrix.grad = torch.zeros(64, 64)
        optimizer = kind([matrix], **options)
        optimizer.step()
        kept = [each for each in optimizer.state[matrix].values() if isinstance(each, torch.Tensor)]
        return sum(each.nbytes for each in kept if each.numel() > 1) / matrix.numel()
    except Exception:  # not installed, or for GPUs only
        return _ADAM


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
