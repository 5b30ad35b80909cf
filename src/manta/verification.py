"""Whether a converted model computes what was trained: logits of both, in one model's memory at a time."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from manta import adapter, tensors
from manta.errors import TrainingError

# What casting the sum once, to this precision, may cost; see `_difference`.
TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}
PROMPTS, TOKENS = 8, 64  # at most; logits take prompts × tokens × vocabulary × 4 bytes
FIXED_PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "1, 2, 3, 4,", "Once upon a time")


def load(base: str, trained: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The tuned model on the CPU: a PeftModel over its base, or a full model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = adapter.is_adapter(trained)
    with warnings.catch_warnings():  # shards of several workers are read by one process, which is meant
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        model = AutoModelForCausalLM.from_pretrained(
            base if lora else trained, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return PeftModel.from_pretrained(model, str(trained)) if lora else model


def verify(
    base: str, trained: Path, converted: Path, prompts: list[list[int]], trust_remote_code: bool
) -> dict[str, Any]:
    """Compare `converted` with what was trained, as transformers and PEFT load it; returns the figures.

    `difference` is that of logits over the largest logit, `effect` the same between base and tuned, of LoRA.
    Raises TrainingError if `difference` is over the tolerance of the precision that most weights are stored in.
    """
    stored = tensors.read(converted)
    precision = Counter(each.dtype for each in stored.values() if each.dtype in TOLERANCE).most_common(1)[0][0]
    size = sum(each.nbytes for each in stored.values()) // tensors.DTYPES[precision].itemsize
    fits = psutil.virtual_memory().available > 1.3 * 4 * size
    compute = torch.float32 if fits else tensors.DTYPES[precision]
    wanted, effect = _outputs(base, trained, prompts, compute, trust_remote_code)
    gc.collect()  # a model's modules refer to each other, and the next one needs the room
    made, _ = _outputs(base, converted, prompts, compute, trust_remote_code)
    difference = _difference(made, wanted)
    tolerance = TOLERANCE[precision]
    if not difference <= tolerance:  # NaN is no agreement
        raise TrainingError(
            f"The converted model is not the trained one: logits differ by {difference:.1e} of the largest, over the "
            f"{tolerance:.0e} that {precision} allows. Nothing was written. Please report the model and the adapter."
        )
    return {
        "prompts": len(prompts),
        "difference": difference,
        "tolerance": tolerance,
        "weights": precision,
        "computed_in": str(compute).removeprefix("torch."),
        **({"effect": effect} if effect is not None else {}),
    }


@torch.inference_mode()
def _outputs(
    base: str, folder: Path, prompts: list[list[int]], dtype: torch.dtype, trust_remote_code: bool
) -> tuple[list[torch.Tensor], float | None]:
    """Logits of the model in `folder`, and how far an adapter moves them."""
    model = load(base, folder, dtype, trust_remote_code).eval()
    logits = _logits(model, prompts)
    if not adapter.is_adapter(folder):
        return logits, None
    with model.disable_adapter():
        return logits, _difference(_logits(model, prompts), logits)


def _logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids])).logits.float() for ids in prompts]


def _difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference at a position, over the largest logit, which nine of ten positions stay within.

    Not all of them: where a router stands between two experts, rounding may choose the other one. A tensor that is
    wrong shows at every position.
    """
    largest = max(float(each.abs().max()) for each in theirs)
    gaps = torch.cat([(one - other).abs().amax(-1).flatten() for one, other in zip(ours, theirs, strict=True)])
    return float(gaps.quantile(0.9)) / largest  # NaN if any is
