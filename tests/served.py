"""What the serving tests share: runs with random adapters, made in a second, and a real `manta serve` over them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from manta import manifest
from manta.config import Config
from manta.runs import Run, checkpoint_path
from ports import free_ports
from tiny import tiny_model

KEY = "sk-canary-that-must-never-be-written"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

LIVELY = {"tie_word_embeddings": False, "initializer_range": 0.1}


def base(folder: Path, template: str | None = TEMPLATE, **shape: Any) -> Path:
    """A random model in `folder` whose answers are not one token again and again; a chat template unless it is None."""
    tiny_model(folder, **{**LIVELY, **shape})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def run_over(model: Path, path: Path, seed: int, full_ft: bool = False, **data: Any) -> Run:
    """A finished run over `model`, as the trainer leaves it, with random adapters or the model's own weights."""
    prepared = path.parent / f"{path.name}-data"
    prepared.mkdir(parents=True)
    row = {"input": "Question: what is the capital of France?\nAnswer: ", "output": "Paris", "row": 0}
    (prepared / "test.jsonl").write_text(json.dumps(row) + "\n")
    run = Run(path)
    config = Config.from_dict({"hf_model_id": str(model), "full_ft": full_ft, "hf_dataset_config": data})
    run.start(config, prepared)
    checkpoint = checkpoint_path(path, 10)
    weights = AutoModelForCausalLM.from_pretrained(model)
    if not full_ft:
        torch.manual_seed(seed)
        adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        weights = get_peft_model(weights, adapters)
    weights.save_pretrained(checkpoint / "model")
    manifest.close(checkpoint, manifest.digests(checkpoint), {"step": 10, "metrics": {"eval_loss": 1.0}})
    return run


@dataclass
class Server:
    """A `manta serve` process that is up, and what it has printed."""

    process: subprocess.Popen[str]
    url: str
    temporary: Path
    output: list[str]

    def stop(self, seconds: float = 90) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def serving(*arguments: str, key: str | None = KEY, seconds: float = 150) -> Iterator[Server]:
    """`manta serve` on a free port and a Ray of its own, with the key in its environment; ended at the end."""
    (port,) = free_ports(1)
    temporary = Path(tempfile.mkdtemp(prefix="ms-", dir="/tmp"))
    environment = {**os.environ, "RAY_TMPDIR": str(temporary)}
    environment.pop("RAY_ADDRESS", None)
    command: list[str | Path] = [Path(sys.executable).with_name("manta"), "serve", "--port", str(port), *arguments]
    if key:
        environment["MANTA_API_KEY"] = key
        command += ["--api_key_env", "MANTA_API_KEY"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output: list[str] = []
    up = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            output.append(line)
            if line.startswith("Serving "):
                up.set()
        up.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert up.wait(seconds) and process.poll() is None, "".join(output)[-4000:]
        yield Server(process, f"http://127.0.0.1:{port}", temporary, output)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def until(wanted: Any, seconds: float = 20) -> bool:
    """Whether `wanted()` becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if wanted():
            return True
        time.sleep(0.05)
    return False


def runs_flags(runs: Sequence[Run]) -> list[str]:
    return [flag for run in runs for flag in ("--run", str(run.path))]
