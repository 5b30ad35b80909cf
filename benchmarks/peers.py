"""The other arms of training.py, each in a process of its own: `python peers.py <arm> <job.json>`.

They get the same model, the same tokens in the same order, and the same LoRA adapters, optimizer and schedule as Manta.
Each writes what it did after every step: when, how many tokens were not padding, and the loss.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.time()


def model_of(job: dict[str, Any], dtype: str = "float32", adapters: bool = True) -> Any:
    """As Manta builds it: adapters drawn from the same seed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model.config.use_cache = False
    if not adapters or job["full_ft"]:
        return model
    torch.manual_seed(job["seed"])
    return get_peft_model(model, lora(job, LoraConfig))


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def lora(job: dict[str, Any], config: Any) -> Any:
    return config(
        task_type="CAUSAL_LM",
        r=job["rank"],
        lora_alpha=job["rank"],
        lora_dropout=job["dropout"],
        target_modules=job["targets"],
        bias="none",
    )


def arguments(job: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "output_dir": job["folder"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not job["cuda"],
        "bf16": job["dtype"] == "bfloat16",
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused",
        **more,
    }


def watched(trainer_class: type, report: dict[str, Any]) -> Any:
    """The trainer, which notes each step."""
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report["times"].append(time.time())

    class Watched(trainer_class):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            report["tokens"].append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
            return super().training_step(model, inputs, *rest)

        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.add_callback(Watch())
            done = super().train(*args, **kwargs)
            report["losses"] = [log["loss"] for log in self.state.log_history if "loss" in log]
            return done

    return Watched


def trl(job: dict[str, Any], report: dict[str, Any]) -> None:
    """SFTTrainer as it comes: bf16 autocast and gradient checkpointing; padded to the longest row, or packed."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = read(job["tokens"])
    data = datasets.Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
            for row in rows
        ]
    )
    options = {"packing": True} if job["packing"] else {}
    if not job["checkpointing"]:
        options["gradient_checkpointing"] = False
    config = SFTConfig(
        **arguments(job, max_length=job["length"], completion_only_loss=True, dataset_num_proc=None, **options)
    )
    from transformers import AutoTokenizer

    watched(SFTTrainer, report)(
        model=model_of(job),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    ).train()


def guide(job: dict[str, Any], report: dict[str, Any]) -> None:
    """The guide's pipeline: a Ray of its own, and one worker of Ray Train with both cores, which the report is of."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def in_worker(job: dict[str, Any]) -> None:
        guide_train_func(job, report)
        Path(job["report"]).write_text(json.dumps({**report, "peak_bytes": peak_bytes()}))

    ray.init(num_cpus=2, log_to_driver=False)
    TorchTrainer(
        in_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 2}),
        run_config=RunConfig(storage_path=job["folder"]),
    ).fit()
    report.update(json.loads(Path(job["report"]).read_text()))


def guide_train_func(job: dict[str, Any], report: dict[str, Any]) -> None:
    """What the guide's train function does, on the device at hand: rows tokenized twice as they are taken, padding to
    the longest, float32 frozen weights, and checkpointing of every layer."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = read(job["rows"])

    class Rows:
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = rows[index]
            found = tokenizer(row["input"] + row["output"], truncation=True, max_length=job["length"])
            prompt = len(tokenizer(row["input"])["input_ids"])
            labels = [-100] * prompt + found["input_ids"][prompt:]
            return {"input_ids": found["input_ids"], "labels": labels, "attention_mask": found["attention_mask"]}

    model = model_of(job, adapters=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if not job["full_ft"]:
        model = get_peft_model(prepare_model_for_kbit_training(model), lora(job, LoraConfig))
    options = arguments(job, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    watched(Trainer, report)(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=Rows(),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    ).train()


# --- Two processes, as the libraries' own examples have it: padded to the longest, DDP


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(columns: list[list[int]], filler: int) -> Any:
        return torch.tensor([column + [filler] * (longest - len(column)) for column in columns])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], 0),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], -100),
    }


def accelerate(job: dict[str, Any], report: dict[str, Any]) -> None:
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if job["dtype"] == "bfloat16" else "no")
    model = model_of(job)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=True)
    loader = torch.utils.data.DataLoader(read(job["tokens"]), batch_size=job["batch"], collate_fn=padded)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        report["tokens"].append(int(accelerator.reduce(batch["attention_mask"].sum())))
        report["times"].append(time.time())


def lightning(job: dict[str, Any], report: dict[str, Any]) -> None:
    import lightning
    import torch

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of(job)

        def training_step(self, batch: Any, index: int) -> Any:
            self.real = batch["attention_mask"].sum()
            return self.model(**batch).loss

        def on_train_batch_end(self, *args: Any) -> None:
            report["tokens"].append(int(self.all_gather(self.real).sum()))
            report["times"].append(time.time())

        def configure_optimizers(self) -> Any:
            trained = [each for each in self.model.parameters() if each.requires_grad]
            return torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=True)

    module = Module()
    module.train()
    loader = torch.utils.data.DataLoader(read(job["tokens"]), batch_size=job["batch"], collate_fn=padded)
    lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=job["steps"], logger=False, enable_checkpointing=False,
        precision="bf16-mixed" if job["dtype"] == "bfloat16" else "32-true",
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader)  # fmt: skip


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


ARMS = {"trl": trl, "guide": guide, "accelerate": accelerate, "lightning": lightning}


if __name__ == "__main__":
    arm, path = sys.argv[1:]
    job = json.loads(Path(path).read_text())
    report: dict[str, Any] = {"started": STARTED, "times": [], "tokens": [], "losses": []}
    ARMS[arm](job, report)
    report.setdefault("peak_bytes", peak_bytes())
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        Path(job["report"]).write_text(json.dumps(report))
