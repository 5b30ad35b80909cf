"""One rank's part of a copy: what it trains, as a safetensors file in memory that says where each shard belongs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from manta import checkpoint
from manta.keeper import about


def trained(model: Any, optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """This rank's tensors by name, and where in the whole tensor each shard begins. Rank 0 has what is not sharded."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensors: dict[str, torch.Tensor] = {}
    boxes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for key, value in (
            (name, parameter.detach()),
            *((f"{name}|{k}", v) for k, v in optimizer.state[parameter].items()),
        ):
            if isinstance(value, DTensor):
                _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
                tensors[key], boxes[key] = value.to_local(), list(offset)
            elif checkpoint.rank() == 0:
                tensors[key] = torch.as_tensor(value)
    return tensors, boxes


def pack(tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> np.ndarray:
    from safetensors.torch import save

    on_host = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
    return np.frombuffer(save(on_host, {"about": json.dumps(described)}), np.uint8)


def unpack(payload: np.ndarray, parameters: dict[str, Any], optimizer: Any) -> None:
    """Copy what of a part belongs to this rank into parameters and optimizer state."""
    from safetensors.torch import load

    boxes = about(payload)["boxes"]
    for key, tensor in load(payload.tobytes()).items():
        name, _, kind = key.partition("|")
        parameter = parameters[name]
        if not kind:
            target = parameter.detach()
        elif tensor.ndim < parameter.ndim:  # a count of steps
            device = parameter.device if optimizer.param_groups[0].get("fused") else "cpu"
            optimizer.state[parameter][kind] = tensor.to(device)
            continue
        else:
            state = optimizer.state[parameter]
            if kind not in state:
                state[kind] = torch.zeros_like(parameter.detach(), dtype=tensor.dtype)
            target = state[kind]
        put(tensor, boxes.get(key), target)


def put(source: torch.Tensor, offset: list[int] | None, target: torch.Tensor) -> None:
    """Copy the part of `source`, which begins at `offset` of the whole tensor, that this rank's shard covers."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mine = [0] * target.ndim
    local = target
    if isinstance(target, DTensor):
        _, begin = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        mine, local = list(begin), target.to_local()
    theirs = offset or [0] * target.ndim
    into, out_of = [], []
    for axis in range(target.ndim):
        first = max(mine[axis], theirs[axis])
        last = min(mine[axis] + local.shape[axis], theirs[axis] + source.shape[axis])
        if first >= last:
            return
        into.append(slice(first - mine[axis], last - mine[axis]))
        out_of.append(slice(first - theirs[axis], last - theirs[axis]))
    local[tuple(into)].copy_(source[tuple(out_of)])
