"""Where a step's time goes: model FLOPs against what products of matrices reach here, and the rest by kind.

    python benchmarks/profiled.py [--steps 6]

Manta's trainer with what `auto` chooses, LoRA on the shape of SmolLM-135M, packs of 1,024 tokens, as in gpu.py; torch's
profiler over the last two steps. The peak is the fastest product of two matrices of 1,024 × 1,024 in its precision, and
as a fairer one of those that the model multiplies. Results go to benchmarks/results/<date>-profiled.{json,md}.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from typing import Any

import gpu
import torch
from report import about, publish, where
from torch.profiler import ProfilerActivity, profile

from manta.model import computes_bfloat16

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
CAPACITY, PROFILED = 1024, 2
KINDS = {
    "products of matrices": r"^aten::(mm|addmm)$|mkldnn|onednn",
    "attention": r"scaled_dot_product|flash_attention|varlen|manta::attend|bmm$|aten::_softmax",
    "loss": r"log_softmax|nll_loss|cross_entropy|exp_$|_Frozen",
    "optimizer": r"adam|Optimizer|_foreach|linalg_vector_norm",
    "casts and copies": r"copy_|_to_copy|clone|contiguous|aten::cat|slice_backward|index",
    "elementwise": r"^aten::(mul|add|silu|pow|mean|rsqrt|neg|sum|div|sub|sigmoid|fill_|zero_|silu_backward)",
}


class Profiling:
    """Over the last steps of a run; `shares` are of the time in operators, by kind."""

    def __init__(self, first: int):
        self.first, self.running = first, profile(activities=[ProfilerActivity.CPU])
        self.shares: dict[str, float] = {}

    def callback(self) -> Any:
        from transformers import TrainerCallback

        outer = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == outer.first:
                    outer.running.start()

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                outer.running.stop()
                outer.shares = shares(outer.running)

        return Callback()


def shares(done: Any) -> dict[str, float]:
    took = dict.fromkeys([*KINDS, "other operators"], 0.0)
    for event in done.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "other operators")
        took[kind] += event.self_cpu_time_total
    return {kind: value / sum(took.values()) for kind, value in took.items()}


def model_products(dtype: torch.dtype) -> float:
    """FLOP/s of the products of one layer and the output, as often as the model has them: the best that it could do."""
    hidden, width, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    layers = SHAPE["num_hidden_layers"]
    keys = hidden // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    sizes = [(hidden, hidden, 2 * layers), (hidden, keys, 2 * layers), (hidden, width, 3 * layers)]
    flops = seconds = 0.0
    for rows, columns, count in [*sizes, (hidden, vocabulary, 1)]:
        left, right = (torch.randn(*size, dtype=dtype) for size in ((CAPACITY, rows), (rows, columns)))
        took = []
        for _ in range(5):
            begin = time.perf_counter()
            left @ right
            took.append(time.perf_counter() - begin)
        flops += 2 * CAPACITY * rows * columns * count
        seconds += min(took) * count
    return flops / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="nothing written")
    options = parser.parse_args()
    dtype = "bfloat16" if computes_bfloat16("cpu") else "float32"
    job = {"shape": SHAPE, "full_ft": False, "device": "cpu", "dtype": dtype}
    job |= {"steps": options.steps, "capacity": CAPACITY}
    with tempfile.TemporaryDirectory() as folder:
        plain = gpu.manta({**job, "folder": folder})
    with tempfile.TemporaryDirectory() as folder:
        profiling = Profiling(options.steps - PROFILED)
        gpu.manta({**job, "folder": folder, "callbacks": [profiling.callback()]})
    seconds = statistics.median(plain["step_s"])
    flops = gpu.model_flops(SHAPE, False, CAPACITY, options.steps) * CAPACITY
    found = about("torch", "transformers", "peft") | {
        "step_s": seconds,
        "model_flops_per_s": flops / seconds,
        "dtype": dtype,
        "square_product": gpu.peak_flops("cpu", getattr(torch, dtype))[0],
        "own_products": model_products(getattr(torch, dtype)),
        "shares": profiling.shares,
    }
    publish("profiled", found, told(found), to_files=not options.quick)


def told(found: dict[str, Any]) -> str:
    reached, square, own = (found[key] / 1e9 for key in ("model_flops_per_s", "square_product", "own_products"))
    return "\n".join(
        [
            f"# Where a step's time goes, {found['date']}",
            "",
            f"LoRA, {found['dtype']}, 135 million parameters, packs of {CAPACITY:,} tokens; {where(found)}. `python "
            "benchmarks/profiled.py`, whose text says what is measured.",
            "",
            f"A step takes {found['step_s']:.2f} s: {reached:,.0f} GFLOP/s of model FLOPs, {reached / square:.0%} of "
            f"what a square product reaches here ({square:,.0f}), {reached / own:.0%} of what the model's own products "
            f"reach alone ({own:,.0f}).",
            "",
            "| in operators | share |",
            "|---|---|",
            *(f"| {kind} | {share:.1%} |" for kind, share in found["shares"].items()),
            "",
        ]
    )


if __name__ == "__main__":
    main()
