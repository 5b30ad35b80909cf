"""A transformers engine from weights on disk."""

from __future__ import annotations

import torch

from manta.data.tokenize import load_tokenizer
from manta.errors import UserError
from manta.serving.batch import adapter_names, load
from manta.serving.catalog import Weights
from manta.serving.scheduler import Limits, TransformersEngine


def load_engine(
    weights: Weights, device: str = "auto", dtype: str = "auto", limits: Limits | None = None
) -> TransformersEngine:
    """One copy of the weights with all adapters; bfloat16 on CUDA and float32 elsewhere unless asked otherwise.

    Raises UserError for weights that cannot be loaded or served.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = torch.bfloat16 if device == "cuda" else torch.float32
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(dtype, auto)
    tokenizer = load_tokenizer(weights.models[0].tokenizer, weights.trust_remote_code)
    try:
        model = load(weights.source, weights.adapters, kind, torch.device(device), weights.trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"The weights {weights.source} cannot be loaded: {error}") from error
    return TransformersEngine(model, tokenizer, adapter_names(weights.adapters), limits)
