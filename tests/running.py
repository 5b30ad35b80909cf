"""What the integration tests share: a small task, a config for it, and what a run left on disk."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from manta.config import Config
from manta.data import prepare
from manta.data.batches import SampleOrder
from manta.data.prepare import Prepared
from manta.runs import Run, checkpoint_path
from tiny import tiny_model

# Flags of a run in whose folder are `base` and `rows.jsonl`.
MODEL_AND_DATA = {
    "hf_model_id": "base",
    "device": "cpu",
    "max_seq_length": "96",
    "hfdc_dataset_name": "rows.jsonl",
    "hfdc_input_template": "Question: {question}\\nAnswer: ",
    "hfdc_output_template": "{answer}",
}

CANARY = "hf_canaryThatMustNeverBeWritten"  # HF_TOKEN of every process of the session
CITIES = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima"}


def write_rows(path: Path, count: int = 96) -> Path:
    """Questions and answers of uneven length, so that micro-batches differ in their number of trained tokens."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            country, city = list(CITIES.items())[number % len(CITIES)]
            why = " because it is the largest city there" * (number % 3)
            row = {"question": f"{number}: what is the capital of {country}?", "answer": f"It is {city}{why}."}
            file.write(json.dumps(row) + "\n")
    return path


def small_config(folder: Path, **settings: Any) -> Config:
    """A run of seconds on two CPU workers, with each step in metrics.jsonl; `data` holds settings of the data.

    The base model is `folder/base` and the data `folder/rows.jsonl`, made on the first call.
    """
    data = {
        "dataset_name": str(folder / "rows.jsonl"),
        "train_split_ratio": 0.75,
        "val_test_split_ratio": 0.25,
        "input_template": "Question: {question}\nAnswer: ",
        "output_template": "{answer}",
        "num_proc": 1,
        **settings.pop("data", {}),
    }
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl")
    if "hf_model_id" not in settings and not (folder / "base").exists():
        tiny_model(folder / "base")
    return Config.from_dict(
        {
            "hf_model_id": str(folder / "base"),
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
            "dtype": "float32",
            "num_workers": 2,
            "dataloader_num_workers": 0,
            "gradient_checkpointing": "none",
            "results_dir": str(folder / "results"),
            "data_dir": str(folder / "prepared"),
            **settings,
            "hf_dataset_config": data,
        }
    )


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    """Until `condition` is true; a failure if that takes longer."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it does not happen"
        time.sleep(0.2)


def run_of(result: dict[str, Any]) -> Run:
    return Run(Path(result["run"]))


def lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that may be missing, or in the middle of a write."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def logged(run: Run, key: str) -> dict[int, float]:
    """`key` of each step's log line; of the last attempt where several did the step."""
    return {line["step"]: line[key] for line in lines(run.metrics_file) if key in line}


def max_gap(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Largest difference over steps; both must have the same steps."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] - theirs[step]) for step in ours)


def order_of(config: Config) -> SampleOrder:
    """The order of samples that `config` stands for, over its prepared data."""
    lengths = prepared_of(config).lengths("training")[0]
    micro_batches = config.gradient_accumulation_steps * (config.nominal_workers or config.num_workers or 1)
    return SampleOrder(len(lengths), config.per_device_train_batch_size, micro_batches, config.seed, lengths)


def prepared_of(config: Config) -> Prepared:
    return prepare.locate(config)[0].fetched()


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


def on_workers(function: Callable[[dict[str, Any]], Any], argument: dict[str, Any], folder: Path) -> Any:
    """`function(argument)` on two Ray Train workers that are joined in a gloo process group; rank 0's answer."""
    from ray import cloudpickle
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cloudpickle.register_pickle_by_value(sys.modules[function.__module__])  # workers cannot import a test
    trainer = TorchTrainer(
        function,
        train_loop_config=argument,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name="on_workers",
            storage_path=str(folder),
            worker_runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}},
        ),
    )
    return trainer.fit().return_value
