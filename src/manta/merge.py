"""A base and what was trained, into one model folder, streamed tensor by tensor: no model is ever in memory.

What is added is computed in float32 and cast once, to the precision in which the base stores that tensor. Peak memory
is the adapter and a few pieces of one tensor; of fused experts that are apart in the files, one layer's product.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from manta import adapter, imports, manifest, names, tensors
from manta.adapter import Change
from manta.errors import UserError
from manta.names import Names
from manta.tensors import Planned, Stored

MAX_SHARD_SIZE = "50GB"  # as in transformers' save_pretrained
_APART = "Keep the adapter apart: --no_merge."
Parts = Callable[[str], dict[str, torch.Tensor]]  # of a parameter, by their names in the files


def merge_adapter(
    base: Path, trained: Path, output: Path, max_shard_size: str = MAX_SHARD_SIZE, trust_remote_code: bool = False
) -> None:
    """Write the model folder `base` with the LoRA adapter `trained` added into the folder `output`, under the base's
    names of tensors.

    A tied embedding that the adapter changes, or its head, is untied. Raises UserError for what cannot be merged, by
    name, before a byte of weights is written.
    """
    _check_plain(base)
    stored = tensors.read(base)
    with imports.quickly():
        model = names.skeleton(base, trust_remote_code)
        where = names.find(model, stored)
        changed = adapter.changes(model, trained)
    untied = {target: source for target, source in where.tied.items() if {target, source} & changed.keys()}

    @_made_once
    def product(parameter: str) -> dict[str, torch.Tensor]:
        change = changed[parameter]
        begin = torch.zeros(where.shape(parameter)) if change.value is None else change.value.float()
        return where.divide_as_stored(parameter, change.applied(begin))

    planned = {name: tensors.as_is(each) for name, each in stored.items()}
    for parameter, change in changed.items():
        if parameter not in {*untied, *untied.values()}:
            planned |= _plan(parameter, change, where, stored, product)
    for target, source in untied.items():
        origin = where.whole.get(source) or where.whole[target]
        for parameter in (source, target):
            name = where.whole.get(parameter, parameter)
            planned[name] = _merged(stored.get(name, stored[origin]), changed.get(parameter, Change()))
    tensors.write(output, planned, max_shard_size)
    _copy_settings(base, output, tie=not untied)


def write_full(
    base: Path, trained: Path, output: Path, max_shard_size: str = MAX_SHARD_SIZE, trust_remote_code: bool = False
) -> None:
    """Write fully trained weights, shards of any number of workers, into the folder `output`, cast to the precision of
    the model folder `base`, whose settings they get.

    Tensors have the names of a model on the hub. Raises UserError if `trained` is not all of such a model.
    """
    _check_plain(base)
    weights = tensors.read(trained)
    precision = _precision(base)
    where = names.find(names.skeleton(base, trust_remote_code), weights)
    if missing := sorted(where.parameters.keys() - where.whole.keys() - where.parts.keys() - where.tied.keys()):
        raise UserError(f"{trained} lacks {len(missing)} parameters of {base}, such as {missing[0]}.")

    @_made_once
    def divided(parameter: str) -> dict[str, torch.Tensor]:
        return where.divide(parameter, weights[parameter].rows(0, where.shape(parameter)[0]))

    planned: dict[str, Planned] = {}
    for name, each in weights.items():
        if where.tied.get(name) in weights:
            continue
        if name in where.parameters:
            _check_shape(each, where.shape(name))
        parts = where.divide(name, where.parameters[name]) if name in where.parameters else {}
        if len(parts) > 1:
            planned |= {part: _part(precision(part), parts[part], part, name, divided) for part in parts}
        else:
            planned[next(iter(parts), name)] = _cast(each, precision(name))
    tensors.write(output, planned, max_shard_size)
    _copy_settings(base, output)


def _made_once(make: Parts) -> Parts:
    """For the chunks of several tensors, which threads ask for: experts.0.down, experts.0.gate, … take turns in a file,
    so that two parameters are kept.
    """
    kept, lock = lru_cache(maxsize=2)(make), Lock()

    def made(parameter: str) -> dict[str, torch.Tensor]:
        with lock:
            return kept(parameter)

    return made


def _plan(
    parameter: str, change: Change, where: Names, stored: dict[str, Stored], product: Parts
) -> dict[str, Planned]:
    """The tensors of the files that `change` changes."""
    if name := where.whole.get(parameter):
        return {name: _merged(stored[name], change)}
    if parameter not in where.parts:
        raise UserError(f"The adapter changes {parameter}, which the base's files do not hold. {_APART}")
    if not change.only_adds:
        raise UserError(f"The adapter scales {parameter}, which the base's files hold in parts. {_APART}")
    parts = where.divide_as_stored(parameter, where.parameters[parameter])
    for name, part in parts.items():
        _check_shape(stored[name], part.shape)
    if change.value is not None:
        return {name: _part(stored[name].dtype, part, name, parameter, product) for name, part in parts.items()}
    return {name: _plus_part(stored[name], parameter, product) for name in parts}


def _merged(stored: Stored, change: Change) -> Planned:
    value = change.value
    if value is None and not change.updates:
        return tensors.as_is(stored)
    if stored.dtype not in tensors.DTYPES:
        raise UserError(f"The base stores {stored.name} as {stored.dtype}, to which nothing can be added. {_APART}")
    if value is not None:
        _check_shape(stored, value.shape)

    def rows(first: int, last: int) -> torch.Tensor:
        weight = stored.rows(first, last).float() if value is None else value[first:last].to(torch.float32, copy=True)
        return change.applied(weight, first)

    return tensors.of_rows(stored.dtype, stored.shape, rows, None if change.by_rows else stored.shape[0])


def _plus_part(stored: Stored, parameter: str, product: Parts) -> Planned:
    def rows(first: int, last: int) -> torch.Tensor:
        return stored.rows(first, last).float().add_(product(parameter)[stored.name][first:last])

    return tensors.of_rows(stored.dtype, stored.shape, rows)


def _part(dtype: str, shape: torch.Tensor, name: str, parameter: str, divided: Parts) -> Planned:
    return tensors.of_rows(dtype, tuple(shape.shape), lambda first, last: divided(parameter)[name][first:last])


def _cast(stored: Stored, dtype: str) -> Planned:
    if stored.dtype == dtype or stored.dtype not in tensors.DTYPES:
        return tensors.as_is(stored)
    return tensors.of_rows(dtype, stored.shape, stored.rows)


def _precision(base: Path) -> Callable[[str], str]:
    """In which precision the base stores a tensor; one that it does not have, as most of its others."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    usual = tensors.dtype_name(getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32"))
    try:
        stored = {name: each.dtype for name, each in tensors.read(base).items() if each.dtype in tensors.DTYPES}
    except UserError:  # pickles: only their settings are of use
        return lambda name: usual
    most = Counter(stored.values()).most_common(1)
    return lambda name: stored.get(name, most[0][0] if most else usual)


def _check_plain(base: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise UserError(f"{base} is quantized ({method}); what was trained cannot be added to it. {_APART}")


def _check_shape(stored: Stored, shape: tuple[int, ...]) -> None:
    if tuple(shape) != stored.shape:
        raise UserError(
            f"{stored.name} is {list(stored.shape)} in files and {list(shape)} where it is to fit. {_APART}"
        )


def _copy_settings(base: Path, output: Path, tie: bool = True) -> None:
    """The base's own, as they are, but for `tie`; code that comes with a model stays with it."""
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if not tie:
        for part in (config, config.get("text_config", {})):
            part["tie_word_embeddings"] = False
    manifest.write_json(output / "config.json", config)
    for file in (base / "generation_config.json", *base.glob("*.py")):
        if file.exists():
            shutil.copyfile(file, output / file.name)
