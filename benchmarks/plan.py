"""How near `manta plan` comes to the memory that training takes, over shapes from tiny to medium, on a CPU.

    python benchmarks/plan.py [--quick]

Each shape is a Llama of random weights. It is estimated as `manta plan` does, and measured by its probe: fresh
processes that load the model and run three steps at full length with the trainer of a worker; the most that such a
process ever had resident (VmHWM), imports included. `net` is the same without what the imports take, which is what the
estimate is really about: there, what allocators and threads hold counts for more the smaller the model is. Results go
to benchmarks/results/<date>-plan.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import RESULTS, about, publish, where

SEED = 0
# hidden, layers, vocabulary, what is trained, precision, recomputed, layout, rows, length, accumulation, workers
SHAPES: list[tuple[int, int, int, str, str, str, str, int, int, int, int]] = [
    (64, 2, 1_000, "lora", "float32", "none", "joined", 2, 256, 1, 1),
    (64, 12, 50_000, "full", "float32", "none", "padded", 4, 128, 1, 1),
    (128, 4, 8_000, "full", "bfloat16", "selective", "joined", 4, 256, 1, 1),
    (256, 2, 50_000, "lora", "bfloat16", "none", "joined", 2, 512, 1, 1),
    (256, 8, 32_000, "full", "float32", "full", "padded", 4, 256, 2, 1),
    (256, 12, 1_000, "lora", "float32", "selective", "joined", 2, 1024, 1, 1),
    (512, 6, 32_000, "full", "float32", "none", "joined", 2, 512, 1, 2),
    (512, 6, 32_000, "full", "bfloat16", "none", "joined", 2, 512, 1, 2),
    (512, 6, 32_000, "lora", "bfloat16", "none", "padded", 2, 256, 1, 2),
    (512, 6, 32_000, "full", "float32", "none", "joined", 2, 512, 1, 1),
    (512, 6, 32_000, "full", "bfloat16", "none", "joined", 2, 512, 1, 1),
    (512, 6, 32_000, "lora", "float32", "none", "padded", 4, 256, 1, 1),
    (1024, 12, 32_000, "lora", "bfloat16", "none", "joined", 1, 512, 1, 1),
    (512, 12, 8_000, "lora", "bfloat16", "full", "joined", 4, 512, 1, 1),
    (1024, 2, 1_000, "full", "float32", "none", "padded", 8, 128, 1, 1),
    (512, 6, 32_000, "full", "bfloat16", "full", "padded", 2, 512, 4, 1),
    (768, 12, 50_000, "lora", "float32", "full", "joined", 2, 512, 1, 1),
    (768, 12, 50_000, "lora", "bfloat16", "selective", "padded", 2, 512, 2, 1),
    (768, 4, 32_000, "full", "float32", "selective", "joined", 1, 1024, 1, 1),
    (1024, 8, 50_000, "full", "float32", "full", "joined", 1, 256, 1, 1),
    (1024, 8, 50_000, "full", "bfloat16", "none", "joined", 1, 256, 1, 1),
]
QUICK = (0, 2)
LIMIT = 0.15


def model_of(folder: Path, hidden: int, layers: int, vocabulary: int) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"{hidden}-{layers}-{vocabulary}"
    if not path.exists():
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 128),
            intermediate_size=hidden * 11 // 4,
            max_position_embeddings=2048,
            tie_word_embeddings=bool(layers % 4),  # of both kinds
            dtype="float32",
        )
        LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def compare(folder: Path, shape: tuple[Any, ...]) -> dict[str, Any]:
    """Estimated and measured bytes of one worker."""
    import torch

    from manta import memory, model
    from manta.config import Config
    from manta.probe import probe
    from manta.simulation import Shape

    hidden, layers, vocabulary, trained, dtype, recomputed, layout, rows, length, accumulation, workers = shape
    config = Config.from_dict(
        {
            "hf_model_id": model_of(folder, hidden, layers, vocabulary), "full_ft": trained == "full", "dtype": dtype,
            "attn_implementation": "documents" if layout == "joined" else "sdpa", "lora_rank": 16, "device": "cpu",
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation,
            "max_seq_length": length, "nominal_workers": workers, "sharding_strategy": "FULL_SHARD",
        }
    )  # fmt: skip
    largest = Shape(1, rows * length) if layout == "joined" else Shape(rows, length, "padded")
    placement = model.Placement(torch.device("cpu"), workers, 1, getattr(torch, dtype))
    began = time.perf_counter()
    estimate = memory.estimate(config, placement, largest, recomputed)
    took = time.perf_counter() - began
    assert estimate is not None
    measured = probe(config, "cpu", workers, largest, recomputed)
    return {
        "shape": shape,
        "estimate": estimate.resident,
        "total": (estimate.resident + measured.baseline) / measured.peak,
        "net": estimate.resident / (measured.peak - measured.baseline),
        "parts": asdict(estimate),
        "estimate_s": took,
        "measured": asdict(measured),
    }


def told(report: dict[str, Any]) -> str:
    rows = report["shapes"]
    totals, nets = [row["total"] for row in rows], [row["net"] for row in rows]
    within = sum(abs(ratio - 1) <= LIMIT for ratio in totals)
    lines = [
        f"# Estimated against measured memory, {report['date']}",
        "",
        f"{where(report)}. `python benchmarks/plan.py`, whose text says how. Of {len(rows)} shapes {within} are "
        f"estimated within {LIMIT:.0%} of the process's peak: from {min(totals):.2f} to {max(totals):.2f} of it, "
        f"median {statistics.median(totals):.2f}. Without what the imports take, {min(nets):.2f} to {max(nets):.2f}, "
        f"median {statistics.median(nets):.2f}.",
        "",
        "| hidden × layers, vocabulary | trained | recomputed | batch | workers | peak, MiB | of that imports | "
        "estimate / peak | without imports |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        hidden, layers, vocabulary, trained, dtype, what, layout, batch, length, accumulation, workers = row["shape"]
        measured = row["measured"]
        times = f" × {accumulation}" if accumulation > 1 else ""
        lines.append(
            f"| {hidden} × {layers}, {vocabulary:,} | {trained}, {dtype} | {what} | {batch} × {length}{times}, "
            f"{layout} | {workers} | {measured['peak'] / 2**20:,.0f} | {measured['baseline'] / 2**20:,.0f} | "
            f"{row['total']:.2f} | {row['net']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes, nothing written")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop then; the same call goes on, that day"
    )
    options = parser.parse_args()
    report, began = about("torch", "transformers", "peft", "accelerate"), time.perf_counter()
    kept = RESULTS / f"{report['date']}-plan.json"
    report["shapes"] = json.loads(kept.read_text())["shapes"] if kept.exists() and not options.quick else []
    done = [tuple(row["shape"]) for row in report["shapes"]]
    with tempfile.TemporaryDirectory(prefix="manta-plan-") as folder:
        for shape in [SHAPES[index] for index in QUICK] if options.quick else SHAPES:
            if shape in done or time.perf_counter() - began > options.seconds:
                continue
            report["shapes"].append(compare(Path(folder), shape))
            latest = report["shapes"][-1]
            print(*shape, f"total {latest['total']:.2f}, net {latest['net']:.2f}", file=sys.stderr, flush=True)
    publish("plan", report, told(report), to_files=not options.quick)


if __name__ == "__main__":
    main()
