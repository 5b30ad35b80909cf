"""Rows that a transformers model generates together, each with its own adapter, over one cache of keys and values.

Rows are padded on the left to one length. What joins is computed on its own and put beside the others; what leaves is
cut out, and the padding that nobody needs any more with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, DynamicCache

from manta.errors import UserError

BASE = "__base__"  # PEFT's name for "no adapter" in a batch of several


def load(weights: str, adapters: Mapping[str, str], dtype: torch.dtype, device: torch.device, trust: bool) -> Any:
    """One copy of the weights with all `adapters` (name → folder) beside it, ready for `Batch`.

    Raises UserError for a model whose state is more than keys and values: rows of it cannot be padded.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, trust_remote_code=trust)
    if getattr(model, "_is_stateful", False):
        raise UserError(
            f"{weights} keeps a state that is not keys and values, which the transformers engine cannot batch. Serve "
            "it with --engine vllm."
        )
    names = adapter_names(adapters)
    for name, folder in adapters.items():
        if hasattr(model, "peft_config"):
            model.load_adapter(folder, adapter_name=names[name])
        else:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder, adapter_name=names[name])
    return model.to(device).eval()


def adapter_names(adapters: Mapping[str, str]) -> dict[str, str]:
    """PEFT's names for ours: a module's name has no dots."""
    return {name: f"adapter{number}" for number, name in enumerate(adapters)}


class Batch:
    """The rows of one model. `adapters` are PEFT's names, BASE for none. Not safe for several threads."""

    def __init__(self, model: Any) -> None:
        self._model = model.get_base_model() if hasattr(model, "peft_config") else model
        self._takes = set(inspect.signature(self._model.forward).parameters)
        self._running: list[str] = []  # the adapters of the rows in the forward pass under way
        self._adapters: list[str] = []
        self._cache: Any = DynamicCache()
        self._mask = torch.ones((0, 0), dtype=torch.long, device=model.device)
        if hasattr(model, "peft_config"):
            self._tell_adapters()

    def __len__(self) -> int:
        return len(self._adapters)

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str]) -> torch.Tensor:
        """Compute prompts, put their rows after the others; returns logits of their next token, rows × vocabulary."""
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        mask = mask.to(self._mask.device)
        cache: Any = DynamicCache()
        logits = self._forward(ids.to(mask.device), mask, cache, adapters)
        if self._adapters:
            width = max(longest, self._mask.shape[1])
            for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
                ours.keys = torch.cat([_widened(ours.keys, width), _widened(theirs.keys, width)])
                ours.values = torch.cat([_widened(ours.values, width), _widened(theirs.values, width)])
            self._mask = torch.cat([F.pad(each, (width - each.shape[1], 0)) for each in (self._mask, mask)])
        else:
            self._cache, self._mask = cache, mask
        self._adapters += adapters
        return logits

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Give each row its next token; returns logits of the one after, rows × vocabulary."""
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = F.pad(self._mask, (0, 1), value=1)
        return self._forward(ids, self._mask, self._cache, self._adapters)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Leave only these rows, in this order."""
        if not rows:
            self.clear()
            return
        chosen = torch.tensor(rows, device=self._mask.device)
        self._adapters = [self._adapters[row] for row in rows]
        mask = self._mask[chosen]
        first = int(mask.any(dim=0).long().argmax())
        self._mask = mask[:, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[chosen, :, first:], layer.values[chosen, :, first:]

    def clear(self) -> None:
        """Leave no row, whatever state a failed step left."""
        self._adapters, self._cache, self._mask = [], DynamicCache(), self._mask.new_ones((0, 0))

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, adapters: Sequence[str]
    ) -> torch.Tensor:
        self._running[:] = adapters
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        return self._model(**{name: value for name, value in given.items() if name in self._takes}).logits[:, -1]

    def _tell_adapters(self) -> None:
        """Hooks that give PEFT's layers the adapters of the rows: what PEFT does anew in each pass, at each layer."""
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        def tell(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "adapter_names": self._running}

        for module in self._model.modules():
            if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
                layer: Any = module
                layer.register_forward_pre_hook(tell, with_kwargs=True)


def _widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values [rows, heads, tokens, size], padded on the left to `width` tokens."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))
