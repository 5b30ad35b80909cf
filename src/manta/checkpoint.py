"""What a checkpoint is: written by all ranks, closed by a manifest, verified before use, loaded into any world size.

    checkpoint_00000060/
        model/                   LoRA: the adapter in PEFT's format; full: sharded safetensors with their config
        optimizer/               torch.distributed.checkpoint, keyed by parameter name
        scheduler.json, trainer_state.json    the latter with the callbacks' state, so that patience survives
        position.json            step, samples consumed, seed: the data order and all randomness follow from these
        manifest.json            sizes, SHA-256, metrics; written last

Every function here is collective: all ranks call it, or none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from manta import manifest, storage
from manta.model import WEIGHTS

OPTIMIZER = "optimizer"
SCHEDULER = "scheduler.json"
POSITION = "position.json"
TRAINER_STATE = "trainer_state.json"


def save(
    folder: Path,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    state: Any,
    position: dict[str, Any],
    about: dict[str, Any],
) -> None:
    """Write everything that a run needs to go on exactly, each rank its own files; `about` goes into the manifest.

    `state` is the library's TrainerState, `position` says how far the data was consumed.
    """
    from transformers.distributed.checkpoint import save_optimizer_distributed

    first, remote = _rank() == 0, storage.is_remote(folder)
    if first:
        storage.remove(folder)  # what a killed attempt left of the same step
        storage.make_folder(folder)
    barrier()
    here = storage.staging(folder, _rank()) if remote else folder
    _save_weights(model, here / WEIGHTS, first)
    save_optimizer_distributed(model, optimizer, str(here / OPTIMIZER))
    if first:
        manifest.write_json(here / SCHEDULER, scheduler.state_dict())
        state.save_to_json(str(here / TRAINER_STATE))
        manifest.write_json(here / POSITION, position)
    barrier()
    files = _upload_together(here, folder) if remote else _digest_together(folder)
    if first:
        manifest.close(folder, files, {"kind": "checkpoint", **about})
    barrier()


def load_optimizer(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Put optimizer and scheduler back as they were, for this world size."""
    from transformers.distributed.checkpoint import load_optimizer_distributed

    load_optimizer_distributed(model, optimizer, str(folder / OPTIMIZER))
    scheduler.load_state_dict(json.loads((folder / SCHEDULER).read_text(encoding="utf-8")))


def choose(preferred: Path | None, others: list[Path]) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint to go on from: `preferred`, or the newest of `others` if it is damaged. Rank 0 decides for all.

    Returns it, and for each checkpoint passed over its name and what is wrong with it. Verified by hash: the
    optimizer's index is a pickle, and flipped bits in weights load without complaint.
    """
    decision: list[Any] = [None, {}]
    if _rank() == 0:
        candidates = [preferred] if preferred else []
        candidates += sorted((path for path in others if path != preferred), reverse=True)
        for path in candidates if preferred else []:
            problem = storage.problem(path)
            if problem is None:
                decision[0] = path
                break
            decision[1][path.name] = problem
    if dist.is_initialized():
        dist.broadcast_object_list(decision, src=0)
    return decision[0], decision[1]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _save_weights(model: Any, folder: Path, first: bool) -> None:
    if hasattr(model, "peft_config"):
        if first:  # adapters are replicated: one rank holds all there is
            _save_adapter(model, folder)
    elif getattr(model, "is_distributed_loading_by_transformers", False):
        hook = model.register_state_dict_post_hook(_separate_tied)
        model.save_pretrained(str(folder), distributed_checkpoint=True)
        hook.remove()
    elif first:
        model.save_pretrained(str(folder))
    barrier()


def _separate_tied(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give tied weights storage of their own: safetensors refuses to write shared memory, and loading wants each name.

    Needed after a resume only: a first load leaves views, which the writer copies.
    """
    seen = set()
    for name, tensor in state.items():
        address = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr()
        if address in seen:
            state[name] = tensor.clone()
        seen.add(address)


def _save_adapter(model: Any, folder: Path) -> None:
    """In PEFT's format. Its own `save_pretrained` also writes a model card, for which it asks the hub."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir()
    # Only what is trained: given the whole model, PEFT gathers every shard of the base, a collective on one rank.
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = get_peft_model_state_dict(model, trained, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(str(folder))


def _upload_together(here: Path, folder: Path) -> manifest.FileDigests:
    """Each rank uploads what it wrote on its node. Digests of all files, as in `_digest_together`."""
    mine = manifest.digests(here)
    storage.upload(here, folder, mine)
    shutil.rmtree(here)
    files: manifest.FileDigests = {}
    for part in gather(mine):
        files |= part
    return dict(sorted(files.items()))


def _digest_together(folder: Path) -> manifest.FileDigests:
    """Digests of all files, each hashed by one rank. The gather is also the barrier before the manifest."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    world = dist.get_world_size() if dist.is_initialized() else 1
    files: manifest.FileDigests = {}
    for part in gather(manifest.digests(folder, names[_rank() :: world])):
        files |= part
    return dict(sorted(files.items()))
