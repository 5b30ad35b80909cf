"""Merging a LoRA adapter: Manta's stream against PEFT's `merge_and_unload` and `save_pretrained`.

    python benchmarks/merge.py [--folder /dev/shm]

A model of 0.7 billion random parameters in bfloat16 and several files, and an adapter of rank 16 on all its linear
layers, are made on the spot. Each arm is a process of its own, three times in the order PEFT, Manta, Manta, PEFT;
seconds are those of the whole process and, apart, those after its imports. Without verification, hashes or tokenizer,
in both arms; what `manta convert` takes with them is given besides. Peak memory is VmHWM, which counts file pages that
are mapped and resident; the peak of anonymous memory alone (RssAnon), looked at every 5 ms, is given too. Every tensor
of both outputs is compared with W + (B @ A) * scale in float32, cast once. The same for Manta at twice the size, to see
that memory does not follow the number of files; its adapter has half the rank, hence the same size. `--folder` in
memory keeps the disk, which both arms write alike, out of the times. Results go to
benchmarks/results/<date>-merge.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from report import about, publish, where

QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
QUIET |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
SHARDS = "300MB"
LAYERS = {"0.7B": 18, "1.4B": 38}
RANKS = {"0.7B": 16, "1.4B": 8}
SCALE = 2
ROUNDS = 3


def write_model(folder: Path, layers: int) -> None:
    """Weights are drawn and written row by row: this process stays small, too."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    from manta import tensors

    config = Qwen3Config(
        **{"vocab_size": 50_000, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": layers},
        **{"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096},
        **{"tie_word_embeddings": True, "dtype": "bfloat16", "architectures": ["Qwen3ForCausalLM"]},
        **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0},
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items() if name != "lm_head.weight"}
    torch.manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> tensors.Planned:
        return tensors.of_rows("BF16", shape, lambda first, last: torch.randn(last - first, *shape[1:]) * 0.02)

    tensors.write(folder, {name: drawn(shape) for name, shape in shapes.items()}, SHARDS)
    words = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(1000)}, unk_token="<1>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>", pad_token="<0>").save_pretrained(str(folder))


def write_adapter(base: Path, folder: Path, rank: int) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from manta import tensors

    targets = [name for name in tensors.read(base) if re.search(r"_proj\.weight$", name)]
    shapes = {name: each.shape for name, each in tensors.read(base).items()}
    weights = {}
    for name in targets:
        out, width = shapes[name]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        weights[f"{module}.lora_A.weight"] = torch.randn(rank, width) * 0.02
        weights[f"{module}.lora_B.weight"] = torch.randn(out, rank) * 0.02
    modules = sorted({name.split(".")[-2] for name in targets})
    LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank * SCALE,
        target_modules=modules,
        base_model_name_or_path=str(base),
    ).save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def with_peft(base: Path, adapter: Path, output: Path) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(output, max_shard_size=SHARDS)
    return start


def with_manta(base: Path, adapter: Path, output: Path) -> float:
    from manta import imports

    with imports.quickly():  # as merge_adapter does
        import peft  # noqa: F401
        from transformers import Qwen3ForCausalLM  # noqa: F401

    from manta.merge import merge_adapter

    start = time.perf_counter()
    output.mkdir()
    merge_adapter(base, adapter, output, SHARDS)
    return start


def converted(base: Path, adapter: Path, output: Path, verify: bool) -> float:
    from transformers import Qwen3ForCausalLM  # noqa: F401

    from manta.convert import Options, write
    from manta.trained import Trained

    start = time.perf_counter()
    about = {"checkpoint": "benchmark", "metrics": {}}
    write(Trained("benchmark", adapter, str(base), about), output, Options(max_shard_size=SHARDS, verify=verify))
    return start


ARMS = {
    "PEFT": with_peft,
    "Manta": with_manta,
    "manta convert --verify false": lambda *folders: converted(*folders, verify=False),
    "manta convert": lambda *folders: converted(*folders, verify=True),
}


def run(arm: str, folder: Path, keep: str | None = None) -> dict[str, float]:
    """One process: its seconds, those after its imports, and its peaks in bytes."""
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, __file__, "--arm", arm, str(folder / "base"), str(folder / "adapter"), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=QUIET)
    anonymous = 0
    while process.poll() is None:
        anonymous = max(anonymous, _memory(process.pid, "RssAnon"))
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    assert process.returncode == 0 and process.stdout
    inside = json.loads(process.stdout.read().splitlines()[-1])
    if keep:
        shutil.rmtree(folder / keep, ignore_errors=True)
        output.rename(folder / keep)
    return {"seconds": seconds, **inside, "peak_anonymous_bytes": anonymous}


def _memory(pid: int | str, name: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.M)
    return int(found[1]) << 10 if found else 0


def unequal(folder: Path, output: str) -> list[str]:
    """Names of the tensors that are not the float32 sum, cast once."""
    import torch
    from safetensors.torch import load_file

    from manta import tensors

    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    base, made = tensors.read(folder / "base"), tensors.read(folder / output)
    assert base.keys() == made.keys()
    wrong = []
    for name, each in base.items():
        weight = each.rows(0, each.shape[0])
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if (down := adapter.get(f"{module}.lora_A.weight")) is not None:
            product = (adapter[f"{module}.lora_B.weight"] @ down) * SCALE
            weight = (weight.float() + product).to(torch.bfloat16)
        if not torch.equal(made[name].rows(0, each.shape[0]), weight):
            wrong.append(name)
    return wrong


def make(folder: Path, size: str) -> dict[str, int]:
    (folder / "base").mkdir(parents=True)
    write_model(folder / "base", LAYERS[size])
    write_adapter(folder / "base", folder / "adapter", RANKS[size])
    files = list((folder / "base").glob("*.safetensors"))
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where models are written; default: the folder for temporary files")
    options = parser.parse_args()
    versions = about("torch", "transformers", "peft", "safetensors")
    report: dict[str, Any] = {**versions, "load": os.getloadavg()[0], "runs": {}, "unequal": {}}
    runs: dict[str, list[dict[str, float]]] = report["runs"]
    with TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        report["0.7B"] = make(folder, "0.7B")
        for arm in ("PEFT", "Manta", "Manta", "PEFT") * ROUNDS:
            runs.setdefault(arm, []).append(run(arm, folder, keep=f"out-{arm}"))
        report["unequal"] = {arm: unequal(folder, f"out-{arm}") for arm in ("Manta", "PEFT")}
        for arm in ("manta convert --verify false", "manta convert"):
            runs[arm] = [run(arm, folder)]
    with TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        report["1.4B"] = make(folder, "1.4B")
        runs["Manta, 1.4B"] = [run("Manta", folder)]
        report["unequal"]["Manta, 1.4B"] = unequal(folder, "out")
    ours, theirs = (_medians(runs[arm]) for arm in ("Manta", "PEFT"))
    report["ratio"] = {key: theirs[key] / ours[key] for key in ours}
    report["folder"] = options.folder
    _write(report)


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in runs) for key in runs[0]}


def _write(report: dict[str, Any]) -> None:
    ratio = report["ratio"]
    rows = [
        f"| {arm} | {each['seconds']:.1f} | {each['work_seconds']:.1f} | {each['peak_bytes'] / 2**20:,.0f} |"
        f" {each['peak_anonymous_bytes'] / 2**20:,.0f} |\n"
        for arm, runs in report["runs"].items()
        for each in runs
    ]
    wrong = {arm: len(names) for arm, names in report["unequal"].items()}
    text = (
        f"# Merge of a LoRA adapter into 0.7 billion parameters, {report['date']}\n\n"
        f"bfloat16, {report['0.7B']['files']} files of {report['0.7B']['bytes'] / 1e9:.2f} GB in all (1.4B: "
        f"{report['1.4B']['files']}, {report['1.4B']['bytes'] / 1e9:.2f} GB); "
        f"rank {RANKS['0.7B']} ({RANKS['1.4B']}) on all linear layers; "
        f"{where(report)}; each run a process of its own, {ROUNDS} times in the order PEFT, Manta, Manta, PEFT, then "
        "the rest.\n\n"
        "| | s, whole process | s, after imports | peak MiB (VmHWM) | peak MiB, anonymous |\n|---|---|---|---|---|\n"
        + "".join(rows)
        + f"\nPEFT over Manta, medians: {ratio['seconds']:.2f} in time ({ratio['work_seconds']:.2f} after imports), "
        f"{ratio['peak_bytes']:.2f} in peak memory ({ratio['peak_anonymous_bytes']:.2f} anonymous). Tensors "
        f"that are not the float32 sum cast once: {wrong}. PEFT and Manta are measured without verification, hashes "
        "and tokenizer; `manta convert` does all of these. The peaks are those of the kernel for the process; file "
        "pages that are mapped and resident count in VmHWM, which Manta avoids by reading.\n\n"
        f"Load of the machine when it began: {report['load']:.1f}. Command: `python benchmarks/merge.py"
        f"{' --folder ' + report['folder'] if report['folder'] else ''}`.\n"
    )
    publish("merge", report, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        began = ARMS[sys.argv[2]](*map(Path, sys.argv[3:6]))
        took = time.perf_counter() - began
        print(json.dumps({"work_seconds": took, "peak_bytes": _memory("self", "VmHWM")}))
    else:
        main()
