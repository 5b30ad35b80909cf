"""What a checkpoint is: written by all ranks, closed by a manifest, verified before use, loaded into any world size.

    checkpoint_00000060/
        model/                   LoRA: the adapter in PEFT's format; full: sharded safetensors with their config
        optimizer/               torch.distributed.checkpoint, keyed by parameter name
        scheduler.json, trainer_state.json    the latter with the callbacks' state, so that patience survives
        position.json            step, samples consumed, seed: the data order and all randomness follow from these
        manifest.json            sizes, SHA-256, metrics; written last

Every function here is collective: all ranks call it, or none. `group` is the process group of a save that goes on in
the background; the default one belongs to training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from manta import manifest, storage
from manta.errors import StorageError
from manta.model import WEIGHTS

OPTIMIZER = "optimizer"
SCHEDULER = "scheduler.json"
POSITION = "position.json"
TRAINER_STATE = "trainer_state.json"


@dataclasses.dataclass
class Snapshot:
    """What a save writes: tensors are this rank's part, and the model's own until `copy` was called."""

    weights: dict[str, Any]
    optimizer: dict[str, Any]
    texts: dict[str, str]  # small files, by name
    configs: list[Any]  # what the library wants beside the weights
    sharded: bool  # weights are divided over the ranks; else rank 0 writes them alone

    def copy(self) -> None:
        """Copy all tensors to host memory of their own; from then on training may go on changing the model."""
        self.weights = {name: _on_host(value) for name, value in self.weights.items()}
        self.optimizer = {name: _on_host(value) for name, value in self.optimizer.items()}


def snapshot(model: Any, optimizer: Any, scheduler: Any, state: Any, position: dict[str, Any]) -> Snapshot:
    """Everything that a run needs to go on exactly. Copies nothing yet.

    `state` is the library's TrainerState, `position` says how far the data was consumed.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    from transformers.distributed.checkpoint import _redistribute_state_dict

    adapter = hasattr(model, "peft_config")
    # By parameter name, which does not depend on how the parameters of this world size are grouped.
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    beside = [model.peft_config["default"]] if adapter else [model.config, model.generation_config]
    return Snapshot(
        weights=_adapter(model) if adapter else _redistribute_state_dict(get_model_state_dict(model)),
        optimizer=_redistribute_state_dict(get_optimizer_state_dict(model, optimizer, options=options)),
        texts={
            SCHEDULER: json.dumps(scheduler.state_dict(), indent=2),
            TRAINER_STATE: state_text(state),
            POSITION: json.dumps(position, indent=2),
        },
        configs=[each for each in beside if each is not None],
        sharded=not adapter,
    )


def state_text(state: Any) -> str:
    """A TrainerState as the library itself writes it."""
    return json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True)


def write(folder: Path, taken: Snapshot, about: dict[str, Any], group: Any = None) -> None:
    """Write a copied snapshot, each rank its own files; `about` goes into the manifest.

    For a remote folder, each rank writes in a folder of its own on its node, and uploads what it wrote.
    Raises StorageError on all ranks with what the storage said to any of them.
    """
    import torch.distributed.checkpoint as dcp

    first, remote = rank() == 0, storage.is_remote(folder)
    here = storage.staging(folder, rank())

    def begin() -> None:
        if first:
            storage.remove(folder)  # what a killed attempt left of the same step
        if first or remote:
            storage.remove(here)
            here.mkdir(parents=True)

    def add_texts() -> None:
        for name, text in taken.texts.items():
            manifest.write_text(here / name, text)

    def digest() -> manifest.FileDigests:
        names = sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.is_file())
        if not remote:
            return manifest.digests(here, names[rank() :: world()])
        mine = manifest.digests(here, names)
        storage.upload(here, folder, mine)
        storage.remove(here)
        return mine

    together(begin, group)
    together(lambda: _write_weights(here / WEIGHTS, taken, group), group)
    together(
        lambda: dcp.save({"optimizer": taken.optimizer}, checkpoint_id=here / OPTIMIZER, process_group=group), group
    )
    together(add_texts if first else None, group)
    files = {name: about for part in together(digest, group) for name, about in part.items()}
    close = {"kind": "checkpoint", **about}
    together((lambda: manifest.close(folder, dict(sorted(files.items())), close)) if first else None, group)


def load_optimizer(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Put optimizer and scheduler back as they were, for this world size."""
    from transformers.distributed.checkpoint import load_optimizer_distributed

    load_optimizer_distributed(model, optimizer, str(folder / OPTIMIZER))
    scheduler.load_state_dict(json.loads((folder / SCHEDULER).read_text(encoding="utf-8")))


def choose(candidates: list[Path]) -> tuple[Path | None, dict[str, str]]:
    """The newest of `candidates` that is whole. Rank 0 decides for all.

    Returns it, and for each checkpoint passed over its name and what is wrong with it. Verified by hash: the
    optimizer's index is a pickle, and flipped bits in weights load without complaint.
    """
    decision: list[Any] = [None, {}]
    if rank() == 0:
        for path in sorted(candidates, key=lambda path: path.name, reverse=True):
            problem = storage.problem(path)
            if problem is None:
                decision[0] = path
                break
            decision[1][path.name] = problem
    resume, damaged = broadcast(decision)
    return resume, damaged


def broadcast(values: list[Any]) -> list[Any]:
    """Rank 0's `values`, on all ranks."""
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any, group: Any = None) -> list[Any]:
    """`value` of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def together(act: Callable[[], Any] | None, group: Any = None) -> list[Any]:
    """What `act` returns on each rank. Raises StorageError everywhere if it raised anywhere, so that no rank waits."""
    result, problem = None, None
    try:
        result = act() if act else None
    except Exception as error:  # libraries raise what they like when a disk is full
        problem = _root_cause(error)
    results = gather((result, problem), group)
    problems = [problem for _, problem in results if problem]
    if problems:
        raise StorageError(problems[0])
    return [result for result, _ in results]


def _root_cause(error: BaseException) -> str:
    """What the storage said, out of the exceptions that torch's checkpoints put around it."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _on_host(value: Any) -> Any:
    """A copy in host memory; of a DTensor, of this rank's part. Tied weights become separate: each name its own."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return DTensor(_on_host(value.to_local()), value._spec, requires_grad=False)
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _write_weights(folder: Path, taken: Snapshot, group: Any) -> None:
    if taken.sharded:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True, enable_consolidation=False)
        dcp.save(taken.weights, storage_writer=writer, process_group=group)
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        if not taken.sharded:  # adapters are the same on every rank
            from safetensors.torch import save_file

            save_file(taken.weights, folder / "adapter_model.safetensors")
        for config in taken.configs:
            config.save_pretrained(str(folder))


def _adapter(model: Any) -> dict[str, torch.Tensor]:
    """In PEFT's names. Its own `save_pretrained` also writes a model card, for which it asks the hub."""
    from peft import get_peft_model_state_dict

    # Only what is trained: given the whole model, PEFT gathers every shard of the base, a collective on one rank.
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = get_peft_model_state_dict(model, trained, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in state.items()}
