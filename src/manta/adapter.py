"""What a LoRA adapter changes, parameter by parameter; PEFT itself reads it, over a model without storage."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from manta.errors import UserError

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Adapters that begin by taking something out of the base's own weights, or stand on other layers than it has.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED = ("layer_replication", "trainable_token_indices", "ensure_weight_tying", "megatron_config")


class Update(Protocol):
    """Something added to a weight, in float32."""

    @property
    def by_rows(self) -> bool:
        """Else only the whole tensor can be computed."""

    def added(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """`weight` are the rows from `first`, float32, and may be changed in place."""


@dataclass(frozen=True)
class LowRank:
    """`up @ down * scale`; up is (out, rank), down (rank, in). `transposed` weights are (in, out). With a `magnitude`
    (out), each output's row is scaled to that norm (DoRA, https://arxiv.org/abs/2402.09353, equation 5).
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    transposed: bool
    magnitude: torch.Tensor | None = None

    @property
    def by_rows(self) -> bool:
        return not (self.transposed and self.magnitude is not None)

    def added(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        last = first + len(weight)
        delta = (self.up @ self.down[:, first:last]).T if self.transposed else self.up[first:last] @ self.down
        merged = weight.add_(delta.mul_(self.scale))
        if self.magnitude is None:
            return merged
        by_output = merged.T if self.transposed else merged
        norm = torch.linalg.norm(by_output, dim=1)
        factor = ((self.magnitude if self.transposed else self.magnitude[first:last]) / norm).view(-1, 1)
        return (factor.T if self.transposed else factor) * merged


@dataclass(frozen=True)
class Experts:
    """A product per expert, for one tensor of all of them; up is (out, rank × experts), down (experts × rank, in).
    `transposed` weights are (experts, in, out). The sums are PEFT's own, so that the result is equal, not only near.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    transposed: bool
    experts: int
    by_rows: bool = True

    def added(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        chosen = slice(first, first + len(weight))
        down = self.down.reshape(self.experts, -1, self.down.shape[-1])[chosen]
        up = self.up.reshape(self.up.shape[0], -1, self.experts)[..., chosen]
        product = torch.einsum("o r e, e r i -> e i o" if self.transposed else "o r e, e r i -> e o i", up, down)
        return weight.add_(product.mul_(self.scale))


@dataclass
class Change:
    """What becomes of a parameter: it is replaced by `value`, or `updates` are added, or both, in this order."""

    value: torch.Tensor | None = None
    updates: list[Update] = field(default_factory=list)

    @property
    def by_rows(self) -> bool:
        return all(update.by_rows for update in self.updates)

    @property
    def only_adds(self) -> bool:
        """Whether the change is a sum, so that it can be divided."""
        return all(getattr(update, "magnitude", None) is None for update in self.updates)

    def applied(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        for update in self.updates:
            weight = update.added(weight, first)
        return weight


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def settings(folder: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def changes(model: Any, folder: Path) -> dict[str, Change]:
    """By parameter of the skeleton `model`, which gets PEFT's layers. Raises UserError for what cannot be merged."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    _check(folder)
    names = set(model.state_dict())
    weights = _weights(folder)
    found: dict[str, Change] = {}
    for key, tensor in weights.items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if name in names:
            found[name] = Change(value=tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a skeleton, and what trained together
        try:
            adapted = get_peft_model(model, LoraConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
            layers = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)}
            for layer in layers.values():
                _give_storage(layer)
            loaded: Any = set_peft_model_state_dict(adapted, weights)
        except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"The adapter {folder} does not fit the base: {error}") from error
    wrong = [key for key in loaded.missing_keys if ".lora_" in key] + list(loaded.unexpected_keys)
    if wrong:
        raise UserError(f"The adapter {folder} does not fit the base: {len(wrong)} tensors, such as {wrong[0]}.")
    for name, layer in layers.items():
        _add(found, name.removeprefix(_PREFIX).replace(".base_layer", ""), layer)
    return found


def _check(folder: Path) -> None:
    config = settings(folder)
    init = str(config.get("init_lora_weights", "")).lower()
    reasons = [f"{name} {config[name]}" for name in _REFUSED if config.get(name)]
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type {config.get('peft_type')}")
    if init.startswith(_OTHER_BASE):
        reasons.append(f"init_lora_weights {init}, which changed the base")
    if reasons:
        raise UserError(f"{folder} cannot be merged: it uses {', '.join(reasons)}. Keep it apart: --no_merge.")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} is damaged or missing ({error}). Train or copy it again.") from error


def _give_storage(layer: Any) -> None:
    for name in layer.adapter_layer_names:
        held = getattr(layer, name, None)
        if isinstance(held, torch.nn.Module):
            held.to_empty(device="cpu")


def _add(found: dict[str, Change], name: str, layer: Any) -> None:
    from peft.tuners.lora import layer as kinds

    (adapter,) = layer.scaling
    variant = layer.lora_variant.get(adapter)
    known = isinstance(layer, kinds.Linear | kinds.Embedding | kinds.ParamWrapper)
    if not known or (variant and "Dora" not in type(variant).__name__):
        what = type(variant or layer).__name__
        raise UserError(
            f"{name} cannot be merged: PEFT's {what} is not known here. Keep the adapter apart: --no_merge."
        )
    scale = layer.scaling[adapter]
    if isinstance(layer, kinds.Embedding):
        up, down = layer.lora_embedding_B[adapter].detach(), layer.lora_embedding_A[adapter].detach()
    else:
        up, down = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
    update: Update
    if isinstance(layer, kinds.ParamWrapper):
        parameter = layer.parameter_name
        update = LowRank(up, down, scale, False)
        if layer.num_experts > 1:
            update = Experts(up, down, scale, not layer._did_swap_in_out_features, layer.num_experts)
    else:
        parameter = "weight"
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach() if variant else None
        transposed = isinstance(layer, kinds.Embedding) or layer.fan_in_fan_out
        update = LowRank(up, down, scale, transposed, magnitude)
    found.setdefault(f"{name}.{parameter}", Change()).updates.append(update)
    if layer.lora_bias.get(adapter):
        _add_bias(found, name, layer, adapter)


def _add_bias(found: dict[str, Change], name: str, layer: Any, adapter: str) -> None:
    if getattr(layer.get_base_layer(), "bias", None) is None:
        raise UserError(f"{name} cannot be merged: its adapter has a bias and it has none. Keep it apart: --no_merge.")
    bias = layer.lora_B[adapter].bias.detach()[:, None]
    found.setdefault(f"{name}.bias", Change()).updates.append(_Column(bias * layer.scaling[adapter]))


@dataclass(frozen=True)
class _Column:
    """A vector, (out, 1), added to a vector."""

    vector: torch.Tensor
    by_rows: bool = True

    def added(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        return weight.add_(self.vector[first : first + len(weight), 0])
