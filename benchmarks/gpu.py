"""One GPU, nothing downloaded: is attention per document right there, and how fast is Manta beside TRL?

    python benchmarks/gpu.py [--shape 8b 1.7b] [--steps 12] [--toy]

Weights are random, made on the device, in the shape of Llama-3-8B (LoRA of rank 16) and Qwen3-1.7B (every weight
trained); batches are packs of 4,096 tokens, documents of 200 to 1,500. First, on the device: attention per document
against torch's own with a mask, a packed document against the same alone, and the fused loss against the one from
logits. Then each arm steps in a process of its own, in the order A B B A: Manta's trainer with what `auto` chooses, and
TRL's SFTTrainer with packing. `--toy` is the same on a CPU with a small shape.
Results go to benchmarks/results/<date>-gpu.{json,md}.

Model FLOPs: 6 N a token for full fine-tuning, 4 N for LoRA, whose frozen weights get no gradients (N: parameters in
matrices, the output's included), and for attention, which is causal, 6 · layers · hidden · length of the token's
document for both. Peak: the accelerator's dense bf16 figure as published, or what a large product of matrices reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import about, publish, where

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "1.7b": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "toy": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
PUBLISHED = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, of the SXM boards
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
WARM_UP = 3


def documents(capacity: int, steps: int, vocabulary: int) -> list[list[np.ndarray]]:
    """Packs of random documents that fill `capacity` exactly, the same in every process."""
    drawn = np.random.default_rng(0)
    packs = []
    for _ in range(steps):
        lengths: list[int] = []
        while (left := capacity - sum(lengths)) > 0:
            lengths.append(min(left, int(drawn.integers(capacity // 20, capacity // 3))))
        packs.append([drawn.integers(1, vocabulary, length) for length in lengths])
    return packs


def base_of(shape: dict[str, Any], device: str, dtype: torch.dtype, implementation: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=8192)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    base.config.use_cache = False
    return base


# --- First: is it right?


def check(device: str) -> dict[str, float]:
    """Largest differences on this device, relative to the largest value. Raises SystemExit over 2 %."""
    from torch.nn.functional import scaled_dot_product_attention

    from manta import attention, loss
    from manta.config import Config

    torch.manual_seed(0)
    lengths = [700, 1, 64, 259] if device == "cuda" else [70, 1, 25]
    kind = {"device": device, "dtype": torch.bfloat16}
    shape = (1, 8, sum(lengths), 64)
    query, key, value = (torch.randn(shape, **kind, requires_grad=True) for _ in range(3))
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    place = torch.arange(sum(lengths), device=device)
    mask = (numbers[:, None] == numbers[None]) & (place[:, None] >= place[None])
    ours, _ = attention.documents(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=edges, max_length_q=max(lengths)
    )
    theirs = scaled_dot_product_attention(query.float(), key.float(), value.float(), mask).transpose(1, 2)
    found = {"attention": _gap(ours, theirs)}
    our_grads = torch.autograd.grad(ours.float().square().sum(), (query, key, value))
    their_grads = torch.autograd.grad(theirs.square().sum(), (query, key, value))
    found["its gradients"] = max(_gap(a, b) for a, b in zip(our_grads, their_grads, strict=True))
    attention.register()
    network = base_of({**SHAPES["toy"], "head_dim": 64}, device, torch.bfloat16, attention.DOCUMENTS).eval()
    ids = torch.arange(1, 61, device=device)[None] % 500
    positions = torch.cat([torch.arange(40), torch.arange(20)])[None].to(device)
    with torch.no_grad():
        packed = network(input_ids=ids, position_ids=positions).logits[:, 40:]
        alone = network(input_ids=ids[:, 40:], position_ids=positions[:, 40:]).logits
    found["a packed document"] = _gap(packed, alone)

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        value = network(input_ids=ids, labels=ids).loss
        return value, torch.autograd.grad(value, network.get_input_embeddings().weight)[0]

    whole = loss_and_gradient()
    loss.settle(network, Config(hf_model_id="toy", fused_loss="on"), device)
    gaps = [_gap(fused, plain) for fused, plain in zip(loss_and_gradient(), whole, strict=True)]
    found |= dict(zip(("a fused loss", "and its gradient"), gaps, strict=True))
    if max(found.values()) > 0.02:
        raise SystemExit(f"Attention per document or the fused loss is wrong on this device: {found}")
    return found


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- Then: how fast?


def manta(job: dict[str, Any]) -> dict[str, Any]:
    """MantaTrainer with what `auto` chooses; the model alone is made here instead of being loaded."""
    from manta import activations, architecture, attention, fit, loss, model
    from manta.config import Config
    from manta.data.batches import Rows, SampleOrder
    from manta.data.packing import Packs
    from manta.runs import Run
    from manta.saver import Saver
    from manta.simulation import Shape
    from manta.trainer import MantaTrainer, training_arguments

    folder, precision = Path(job["folder"]), job.get("dtype", "bfloat16")
    dtype = getattr(torch, precision)
    base_of(job["shape"], "meta", dtype, "sdpa").config.save_pretrained(folder / "model")
    config = Config.from_dict(
        {
            "hf_model_id": str(folder / "model"), "full_ft": job["full_ft"], "max_steps": job["steps"],
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "lora_rank": 16, "lora_alpha": 16,
            "lora_dropout": 0, "lora_target_modules": TARGETS, "packing": True, "max_seq_length": job["capacity"],
            "logging_steps": 1, "eval_steps": 0, "dtype": precision, "dataloader_num_workers": 0,
            "results_dir": str(folder / "results"),
        }
    )  # fmt: skip
    device = torch.device(job["device"])
    placement = model.Placement(device, dtype=dtype)
    attention.register()
    there = fit.room(placement)
    chosen = model.attention_of(config, device.type, architecture.skeleton(config))
    base = base_of(job["shape"], job["device"], torch.float32 if job["full_ft"] else dtype, chosen)
    network = model.adapted(base, config, placement)
    layout = model.settle_layout(network, config, placement)
    loss.settle(network, config, device.type)
    settled = fit.settle(config, placement, Shape(1, job["capacity"], layout), there)
    activations.recompute(network, settled.recomputed)
    packs = documents(job["capacity"], job["steps"], job["shape"]["vocab_size"])
    flat = [document for pack in packs for document in pack]
    samples = [{"input_ids": each, "labels": each.copy(), "row": row} for row, each in enumerate(flat)]
    edges = np.cumsum([0, *map(len, packs)])
    run = Run(folder / "results" / "run")
    run.path.mkdir(parents=True)
    trainer = MantaTrainer(
        model=network,
        args=training_arguments(config, run, placement, 1),
        train_dataset=Rows(samples, Packs(edges, np.arange(len(samples)))),
        order=SampleOrder(job["steps"], 1, 1, config.seed),
        layout=layout,
        run=run,
        saver=Saver(run, 0, None, False, print),
        fingerprint="",
        start_step=0,
    )
    return {**stepped(trainer, job), "attention": chosen, "checkpointing": f"{settled.recomputed} ({settled.why})"}


def trl(job: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer with packing, as it comes: bf16, checkpointing; flash_attention_2 where it is installed."""
    import importlib.util

    import datasets
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    implementation = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    base = base_of(job["shape"], job["device"], torch.float32 if job["full_ft"] else torch.bfloat16, implementation)
    if not job["full_ft"]:
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=TARGETS.split(","))
        base = get_peft_model(base, lora)
    packs = documents(job["capacity"], job["steps"], job["shape"]["vocab_size"])
    rows = [{"input_ids": each.tolist()} for pack in packs for each in pack]
    config = SFTConfig(
        output_dir=job["folder"], max_steps=job["steps"], per_device_train_batch_size=1, packing=True,
        max_length=job["capacity"], logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, bf16=True,
        use_cpu=job["device"] == "cpu", optim="adamw_torch_fused",
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, "<eos>")), eos_token="<eos>", pad_token="<eos>"
    )
    trainer = SFTTrainer(
        model=base, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    return {**stepped(trainer, job), "attention": implementation, "checkpointing": "full as it comes"}


def stepped(trainer: Any, job: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainerCallback

    times: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if job["device"] == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    for callback in (Watch(), *job.get("callbacks", ())):
        trainer.add_callback(callback)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    peak = torch.cuda.max_memory_allocated() if job["device"] == "cuda" else None
    return {"step_s": np.diff(times)[WARM_UP - 1 :].tolist(), "losses": losses, "peak_bytes": peak}


def model_flops(shape: dict[str, Any], full_ft: bool, capacity: int, steps: int) -> float:
    """Of one token."""
    hidden, layers, width = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    matrices = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * width) + shape["vocab_size"] * hidden
    packs = documents(capacity, steps, 2)
    seen = sum(len(each) ** 2 for pack in packs for each in pack) / (capacity * steps)
    return (6 if full_ft else 4) * matrices + 6 * layers * hidden * seen


def peak_flops(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[float, str]:
    """FLOP/s that MFU counts against, and where the figure is from."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for known, figure in PUBLISHED.items():
            if known in name:
                return figure, f"{name}, as published"
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, dtype=dtype, device=device)
    took = []
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    return 2 * size**3 / min(took), f"a product of {size} × {size} here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=["8b", "1.7b"], default=["8b", "1.7b"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--toy", action="store_true", help="on the CPU, a small shape, nothing written")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # one arm, in its own process
    options = parser.parse_args()
    if options.job:
        job = json.loads(Path(options.job).read_text())
        found = {"manta": manta, "trl": trl}[job["arm"]](job)
        Path(job["report"]).write_text(json.dumps(found))
        return
    device = "cpu" if options.toy else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. --toy runs the same on a CPU with a small shape.")
    report = about("torch", "transformers", "peft", "trl")
    report["peak"], report["peak_from"] = peak_flops(device)
    report["right"] = check(device)
    print(f"Right on {device}: {report['right']}", file=sys.stderr, flush=True)
    capacity = 256 if options.toy else 4096
    for name in ["toy"] if options.toy else options.shape:
        shape, full_ft = SHAPES[name], name == "1.7b"
        runs: dict[str, list[dict[str, Any]]] = {"manta": [], "trl": []}
        for arm in ("manta", "trl", "trl", "manta"):
            with tempfile.TemporaryDirectory() as folder:
                job = {
                    "arm": arm, "shape": shape, "full_ft": full_ft, "device": device, "steps": options.steps,
                    "capacity": capacity, "folder": folder, "report": f"{folder}/report.json",
                }  # fmt: skip
                path = Path(folder, "job.json")
                path.write_text(json.dumps(job))
                command = [sys.executable, __file__, "--job", str(path)]
                hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.toy else {}
                environment = os.environ | hidden | {"HF_HUB_OFFLINE": "1"}
                subprocess.run(command, check=True, env=environment)
                runs[arm].append(json.loads(Path(job["report"]).read_text()))
        report[name] = {"runs": runs, "flops": model_flops(shape, full_ft, capacity, options.steps), "full_ft": full_ft}
    publish("gpu", report, told(report, capacity), to_files=not options.toy)


def told(report: dict[str, Any], capacity: int) -> str:
    lines = [
        f"# One device, {report['date']}",
        "",
        f"{where(report)}. Peak {report['peak'] / 1e12:,.1f} TFLOP/s ({report['peak_from']}). `python "
        "benchmarks/gpu.py`, whose text says how model FLOPs are counted. Largest differences of attention per "
        "document: " + ", ".join(f"{name} {gap:.1e}" for name, gap in report["right"].items()) + ".",
        "",
        "| shape | arm | tok/s | MFU | peak memory | attention | checkpointing |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (key for key in SHAPES if key in report):
        about_shape = report[name]
        for arm, runs in about_shape["runs"].items():
            rate = capacity / statistics.median(second for run in runs for second in run["step_s"])
            used = rate * about_shape["flops"] / report["peak"]
            peak = f"{runs[0]['peak_bytes'] / 2**30:.1f} GiB" if runs[0]["peak_bytes"] else ""
            kind = "full" if about_shape["full_ft"] else "LoRA"
            lines.append(
                f"| {name}, {kind} | {arm} | {rate:,.0f} | {used:.1%} | {peak} | {runs[0]['attention']} | "
                f"{runs[0]['checkpointing']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
