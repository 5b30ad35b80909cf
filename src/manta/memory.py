"""What a worker's memory is for, part by part, before there is a weight.

What stands still (weights, optimizer, buffers of FSDP, copies) follows from shapes; what comes and goes in a step is
counted by running it without storage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from manta import architecture, attention, loss, model
from manta.activations import Recomputed, recompute
from manta.config import Config
from manta.data.batches import Layout, most_tokens
from manta.model import Placement
from manta.simulation import KINDS, LARGE, Kind, Shape, Step, passes, simulate

# Threads, kernels' buffers and modules that are imported late, on a CPU: benchmarks/results/*-plan.md.
RUNTIME = 52 * 2**20
_FEW_LAYERS = (2, 3)
# Of what is alive, a CPU's heap held up to 0.4 besides in models of some size: tests/unit/test_memory.py.
_HELD, _HELD_BESIDES = 0.5, 32 * 2**20
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
    return _of_step(standing, step, config, placement)


def at_most(config: Config, placement: Placement, shape: Shape) -> Memory | None:
    """No less than `estimate` finds where nothing is computed again, in the time of a few layers.

    In the forward pass each further layer keeps as much as the one before it; what the backward pass adds is no more
    than its most for few layers; and all gradients are counted. None where layers are not alike, or cannot run without
    storage.
    """
    network = bare_network(config, placement, shape)
    standing, layers = _standing(config, network, placement), len(model.layer_names(network))
    if layers < max(_FEW_LAYERS) or not model.has_layers_alike(network):
        return None
    found: list[tuple[dict[Kind, float], dict[Kind, float]]] = []
    for few in _FEW_LAYERS:
        shortened = bare_network(config, placement, shape, few)
        recompute(shortened, "none")
        if (both := passes(shortened, placement, shape)) is None:
            return None
        found.append(both)
    (fewer, _), (more, backward) = found
    times = (layers - _FEW_LAYERS[1]) / (_FEW_LAYERS[1] - _FEW_LAYERS[0])
    most = {kind: int(more[kind] + times * (more[kind] - fewer[kind]) + backward[kind]) for kind in KINDS}
    trained = {name: each.numel() for name, each in network.named_parameters() if each.requires_grad}
    shards = _shards(config, placement)
    most["gradients"] = sum(4 * size // (1 if model.is_adapter(name) else shards) for name, size in trained.items())
    held = _HELD * sum(most.values()) + _HELD_BESIDES if placement.device.type == "cpu" else 0
    return _of_step(standing, Step(**most, held=int(held)), config, placement)


def _of_step(standing: Memory, step: Step, config: Config, placement: Placement) -> Memory:
    offloaded = config.fsdp_cpu_offload and placement.device.type != "cpu"
    return replace(
        standing,
        gradients=0 if offloaded else step.gradients,
        activations=step.activations,
        logits=step.logits,
        casts=step.casts,
        held=step.held,
    )


def bare_network(config: Config, placement: Placement, shape: Shape, layers: int | None = None) -> Any:
    """The model as it is trained, without storage: dtypes, adapters, attention. With `layers`, so many of its own."""
    bare: Any = architecture.skeleton(config)
    if layers:
        model.shorten(bare, layers)
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
