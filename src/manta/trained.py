"""What there is to convert: weights, the base they belong to, and where they come from.

Beside Manta's own checkpoints these are folders that the Hugging Face Trainer wrote under Ray, as in the guide:
`TorchTrainer_*/checkpoint_*/checkpoint/` with an adapter or `model.safetensors`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manta import adapter, storage, tensors
from manta.config import Config, whole_path
from manta.data.prepare import Prepared
from manta.errors import UserError

_PLACES = ("", "checkpoint", "checkpoint_*/checkpoint", "*/checkpoint_*/checkpoint", "checkpoint-*")


@dataclass(frozen=True)
class Trained:
    """`weights` is a folder on this node with an adapter in PEFT's format, or with every weight."""

    name: str
    weights: Path
    base: str
    lineage: dict[str, Any] = field(default_factory=dict)
    config: Config | None = None
    prepared: Prepared | None = None

    @property
    def is_adapter(self) -> bool:
        return adapter.is_adapter(self.weights)

    @property
    def trust_remote_code(self) -> bool:
        return self.config is not None and self.config.trust_remote_code

    def tokenizer_source(self) -> str:
        """Where the tokenizer is: with the weights if they have one, else with the base."""
        return str(self.weights) if (self.weights / "tokenizer_config.json").exists() else self.base

    def test_texts(self, count: int) -> list[tuple[str, bool]]:
        """(prompt, whether special tokens are in it already) of the first rows that were held out."""
        path = self.prepared.text("test") if self.prepared else None
        if path is None or not path.is_file():
            return []
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
        return [(row["input"] + row["output"], "messages" in row) for row in rows]


def in_folder(folder: str | Path, base: str | None = None, checkpoint: str = "best") -> Trained:
    """The checkpoint in a folder that Manta did not write. `checkpoint` "latest" takes that of the highest name.

    Raises UserError if there is none, if there are several and none is said, or if the base is not known.
    """
    top = storage.place(folder)
    if storage.is_remote(top):
        raise UserError(f"{folder} was not written by Manta, so it has to be on this machine. Copy it here first.")
    found: list[Path] = []
    for place in _PLACES:
        found = found or sorted(path for path in (top.glob(place) if place else [top]) if _has_weights(path))
    if not found:
        raise UserError(
            f"{folder} is not a run, and holds no checkpoint: no adapter, no model.safetensors. Check --run."
        )
    if len(found) > 1 and checkpoint != "latest":
        listed = "\n".join(f"  --checkpoint_dir {path}" for path in found)
        raise UserError(f"{folder} holds {len(found)} checkpoints; say which, or --checkpoint latest:\n{listed}")
    weights = found[-1]
    if base is None and adapter.is_adapter(weights):
        base = adapter.settings(weights).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{weights} does not say which model was tuned. Give --base_model.")
    name = next(part for part in reversed(weights.parts) if not part.startswith("checkpoint"))
    return Trained(name, weights, whole_path(base), {"run": str(top), "checkpoint": weights.parent.name, "metrics": {}})


def _has_weights(folder: Path) -> bool:
    full = any((folder / name).exists() for name in (tensors.WEIGHTS_FILE, tensors.INDEX))
    return full or (adapter.is_adapter(folder) and (folder / adapter.WEIGHTS_FILE).exists())
