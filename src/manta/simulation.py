"""A training step without storage: which bytes are alive, and when most are.

The model is run forward and backward on torch's fake tensors, which have shapes, types and devices, and no values
(https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html). Every tensor that an operator makes is counted
until nothing refers to it any more, so that what autograd keeps, what is cast and what is computed again count as they
happen. It takes as long as Python needs for the operators, whatever the size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manta import model
from manta.data.batches import Layout
from manta.heap import Heap
from manta.model import Placement

Kind = Literal["activations", "logits", "casts", "gradients"]
# From this size on the C library gives memory back when it is freed (glibc's M_MMAP_THRESHOLD at most: mallopt(3)).
LARGE = 32 * 2**20
_CANNOT = (NotImplementedError, RuntimeError, TypeError, ValueError)  # what a model says that reads values
KINDS: tuple[Kind, ...] = ("activations", "logits", "casts", "gradients")


class Shape(NamedTuple):
    """The largest micro-batch: `rows` of `length` tokens; joined, all of it is one row."""

    rows: int
    length: int
    layout: Layout = "joined"

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Step:
    """Bytes on one worker when most are alive, beside parameters and optimizer state; gradients are of its shard."""

    activations: int
    logits: int
    casts: int
    gradients: int
    held: int  # what the heap of a CPU is larger than what is alive, in the second step and later


def simulate(
    network: Any, placement: Placement, shape: Shape, accumulates: bool, shards: int = 1, state: float = 8
) -> Step | None:
    """Forward and backward of `network`, which is on torch's meta device, as the trainer runs them.

    `accumulates`: gradients of earlier micro-batches are there when it begins. `shards`: over how many workers FSDP
    divides what is trained of the base. `state`: bytes of the optimizer per trained parameter. As if every token were
    trained. None for a model that cannot run without storage, such as a mixture of experts, whose routing reads values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    edges = _edges(shape)
    heap = Heap() if placement.device.type == "cpu" else None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            alive = _bare(network, shape, heap)
            trained = [(name, each) for name, each in network.named_parameters() if each.requires_grad]
            sizes = {each: 4 * each.numel() / (1 if model.is_adapter(name) else shards) for name, each in trained}
            alive.follow_gradients(sizes, accumulates)
            with alive:
                _forward(network, placement, shape, edges).backward()
                standing = 0.0
                if heap:  # the optimizer's state lies between what comes and goes, and holes stay
                    standing = sum(sizes.values()) * state / 4
                    for size in sizes.values():
                        heap.take(int(size * state / 4))
                    alive.end_step(accumulates)
                    _forward(network, placement, shape, edges).backward()
    except _CANNOT:
        return None
    finally:
        if heap:
            heap.close()
    held = max(0, heap.most - alive.most - standing) if heap and heap.most else 0
    return Step(**{kind: int(alive.at_peak[kind]) for kind in KINDS}, held=int(held))


def passes(network: Any, placement: Placement, shape: Shape) -> tuple[dict[Kind, float], dict[Kind, float]] | None:
    """Of each kind the most bytes in the forward pass, and in the backward pass, each when most of it is alive.

    Sooner known than what `simulate` finds, since the heap is left out. None as there; gradients are not counted.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    edges = _edges(shape)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            alive = _bare(network, shape, None)
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
            with alive:
                loss = _forward(network, placement, shape, edges)
                forward, alive.most_of = alive.most_of, alive.now.copy()
                loss.backward()
    except _CANNOT:
        return None
    return forward, alive.most_of


def _bare(network: Any, shape: Shape, heap: Heap | None) -> _Alive:
    network.to_empty(device="cpu")  # the devices differ in attention, which saves as much on both
    network.tie_weights()
    return _Alive(network, shape, heap)


def _edges(shape: Shape) -> torch.Tensor:
    """Made outside of what has no values: attention reads them."""
    return torch.tensor([0, shape.tokens], dtype=torch.int32)


def _forward(network: Any, placement: Placement, shape: Shape, edges: torch.Tensor) -> torch.Tensor:
    rows, length = (1, shape.tokens) if shape.layout == "joined" else (shape.rows, shape.length)
    ids = torch.zeros(rows, length, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "shift_labels": ids, "use_cache": False}
    inputs["num_items_in_batch"] = torch.ones((), dtype=torch.long)
    if shape.layout == "joined":
        inputs["position_ids"] = ids
        inputs |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
        inputs |= {"max_length_q": length, "max_length_k": length}
    elif rows > 1 or shape.layout == "packed":  # whole, or the library looks at values
        inputs["attention_mask"] = torch.ones(rows, 1, length, length, dtype=torch.bool)
    with model.autocast(replace(placement, device=ids.device)):
        found = network(**inputs)
    logits = found.logits.float()  # accelerate gives every output in float32
    del logits
    return found.loss


class _Alive(TorchDispatchMode):
    """Bytes of living storages by kind, now and when they were most."""

    def __init__(self, network: Any, shape: Shape, heap: Heap | None):
        super().__init__()
        self.now: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        self.at_peak, self.most_of = self.now.copy(), self.now.copy()
        self.most = 0.0
        self.heap = heap
        self._gradients: list[tuple[float, int | None]] = []
        self._living: dict[int, Any] = {}
        self._own = {each.untyped_storage()._cdata for each in (*network.parameters(), *network.buffers())}
        self._logits = shape.tokens * network.get_output_embeddings().weight.shape[0]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, function, args)
        return result

    def _count(self, tensor: torch.Tensor, function: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._living or address in self._own:
            return
        kind: Kind = "activations"
        if tensor.numel() == self._logits:
            kind = "logits"
        elif function is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._own:
            kind = "casts"
        size = storage.nbytes()

        piece = self.heap.take(size) if self.heap else None

        def end(_: Any) -> None:
            del self._living[address]
            self.now[kind] -= size
            if self.heap:
                self.heap.give(piece)

        self._living[address] = weakref.ref(storage, end)
        self._add(kind, size)

    def follow_gradients(self, sizes: dict[torch.Tensor, float], accumulates: bool) -> None:
        """They stay, float32, as this worker's shards: from the beginning, or each as soon as it is whole."""
        for parameter, size in sizes.items():
            if accumulates:
                self._keep_gradient(size)
            parameter.register_post_accumulate_grad_hook(partial(self._reduce, size, accumulates))

    def end_step(self, accumulates: bool) -> None:
        """Without gradients, unless the step had several micro-batches, which is what then counts."""
        for size, piece in self._gradients if not accumulates else []:
            self.now["gradients"] -= size
            if self.heap:
                self.heap.give(piece)
        self._gradients = []

    def _reduce(self, size: float, accumulates: bool, parameter: torch.Tensor) -> None:
        parameter.grad = None
        if not accumulates:
            self._keep_gradient(size)

    def _keep_gradient(self, size: float) -> None:
        self._gradients.append((size, self.heap.take(int(size)) if self.heap else None))
        self._add("gradients", size)

    def _add(self, kind: Kind, size: float) -> None:
        self.now[kind] += size
        self.most_of[kind] = max(self.most_of[kind], self.now[kind])
        if (total := sum(self.now.values())) > self.most:
            self.most, self.at_peak = total, self.now.copy()
