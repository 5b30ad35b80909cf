"""What the integration tests share: a small task, a config for it, and what a run left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model

from manta.config import Config
from manta.runs import Run, checkpoint_path

CITIES = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima"}


def write_rows(path: Path, count: int = 96) -> Path:
    """Questions and answers of uneven length: the workers' micro-batches differ in trained tokens."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            country, city = list(CITIES.items())[number % len(CITIES)]
            why = " because it is the largest city there" * (number % 3)
            row = {"question": f"{number}: what is the capital of {country}?", "answer": f"It is {city}{why}."}
            file.write(json.dumps(row) + "\n")
    return path


def small_config(folder: Path, **settings: Any) -> Config:
    """A run of seconds on two CPU workers, with each step's loss in metrics.jsonl."""
    data = {
        "dataset_name": str(folder / "rows.jsonl"),
        "train_split_ratio": 0.75,
        "val_test_split_ratio": 0.25,
        "input_template": "Question: {question}\nAnswer: ",
        "output_template": "{answer}",
        "num_proc": 1,
        **settings.pop("data", {}),
    }
    if not Path(data["dataset_name"]).exists() and Path(data["dataset_name"]).parent == folder:
        write_rows(folder / "rows.jsonl")
    if "hf_model_id" not in settings:
        settings["hf_model_id"] = str(folder / "base")
        if not (folder / "base").exists():
            tiny_model(folder / "base")
    return Config.from_dict(
        {
            "max_steps": 12,
            "max_seq_length": 96,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "lora_rank": 4,
            "lora_alpha": 8,
            "logging_steps": 1,
            "eval_steps": 6,
            "save_steps": 6,
            "device": "cpu",
            "num_workers": 2,
            "dataloader_num_workers": 0,
            "gradient_checkpointing": False,
            "results_dir": str(folder / "results"),
            "data_dir": str(folder / "prepared"),
            **settings,
            "hf_dataset_config": data,
        }
    )


def logged(run: Run, key: str) -> dict[int, float]:
    """`key` of each step's log line; of the last attempt where several did the step."""
    lines = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint trained, whole, as one process reads it."""
    folder = checkpoint_path(run.path, step) / "model"
    if (folder / "adapter_model.safetensors").exists():
        from safetensors.torch import load_file

        return load_file(folder / "adapter_model.safetensors")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()


def max_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
