"""Where each parameter of a model is in its files: loading renames tensors, and makes one parameter of several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manta.errors import UserError

# Conversions that only move numbers: what is added to their result can be added to what they are made from.
_REARRANGING = {"Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose"}


@dataclass(frozen=True)
class Names:
    """`whole` says which tensor of the files a parameter is; `parts`, from which ones loading makes it; `tied`, from
    which other parameter it is taken. `parameters` are all of the model, on the meta device.
    """

    model: Any
    parameters: dict[str, torch.Tensor]
    whole: dict[str, str]
    parts: dict[str, tuple[str, ...]]
    tied: dict[str, str]

    def shape(self, parameter: str) -> tuple[int, ...]:
        return tuple(self.parameters[parameter].shape)

    def divide(self, parameter: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """`tensor` in the shape of `parameter`, as the tensors that the files would hold, by their names there."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, {parameter: tensor})

    def divide_as_stored(self, parameter: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same by the names of `parts`. Raises UserError if the files cannot be what that division gives."""
        prefix = self.model.base_model_prefix
        stored: dict[str, torch.Tensor] = {}
        for name, part in self.divide(parameter, tensor).items():
            named = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
            stored |= {each: part for each in named if each in self.parts[parameter]}
        if len(stored) != len(self.parts[parameter]):
            raise UserError(
                f"The adapter changes {parameter}, whose tensors in the base's files cannot be told apart. "
                "Keep the adapter apart: --no_merge."
            )
        return stored


def skeleton(folder: Path, trust_remote_code: bool) -> Any:
    """The model without storage, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="eager"
        )


def find(model: Any, stored: Iterable[str]) -> Names:
    """The places of a skeleton's parameters among tensors named `stored`, by the rules of the library's own loading.

    Raises UserError for a parameter that loading computes from its parts in another way than by moving numbers.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    parameters = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings: list[Any] = [each for each in transforms if not isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix
    whole: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for name in sorted(stored, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters:
            parameter, pattern = rename_source_key(name, [], [], prefix, parameters)
        if pattern is None:
            whole[parameter] = name
        elif all(type(step).__name__ in _REARRANGING for step in _converter(converters, pattern).operations):
            parts.setdefault(parameter, []).append(name)
    return Names(
        model, parameters, whole, {name: tuple(made) for name, made in parts.items()}, dict(model.all_tied_weights_keys)
    )


def _converter(converters: list[Any], pattern: str) -> Any:
    return next(each for each in converters if pattern in each.source_patterns)
