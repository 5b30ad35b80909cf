"""The Hugging Face Trainer with three things made exact: the order of batches, randomness, and the evaluation loss.

The loop itself is the library's. What is overridden, and why, stands at each method.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from manta import checkpoint, copies, extras, ledger
from manta.config import Config
from manta.data.batches import MASKED, EvalBatches, Layout, Rows, SampleOrder, TrainBatches, collate
from manta.data.tokenize import IGNORE
from manta.errors import NonFiniteError, UserError
from manta.loss import keeps_logits
from manta.model import Placement
from manta.runs import METRIC, Run, checkpoint_path
from manta.saver import Saver

_LOG_IN_COPIES = 20  # lines
MOST_SKIPPED = 5  # steps in a row that are left out for their gradient, before it is no accident
_PADDING = 0  # ids under padding are masked everywhere; any valid id will do


def reseed(*parts: int) -> None:
    """Set torch's generators, CPU and CUDA, from integers mixed by numpy's SeedSequence."""
    seed = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed >> np.uint64(1)))


class MantaTrainer(Trainer):
    """`order` says which sequences a step takes, and `layout` how they become a batch; `run` is where
    checkpoints go, and `saver` writes them; `fingerprint` goes into each manifest.

    Attributes set while training, for callbacks: `tokens` counts the real (not padding) tokens of this worker's
    current step; `entries` is what it consumed since the last complete checkpoint.
    """

    def __init__(
        self,
        *,
        order: SampleOrder,
        layout: Layout,
        run: Run,
        saver: Saver,
        fingerprint: str,
        start_step: int,
        skip_non_finite: bool = False,
        mailbox: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.skip_non_finite, self.mailbox = skip_non_finite, mailbox
        self.skipped: list[int] = []  # steps without an update, one after the other
        self._loss_before: Any = None
        self.order, self.layout, self.run, self.saver, self.fingerprint = order, layout, run, saver, fingerprint
        self.start_step = start_step
        self.picked = keeps_logits(self.model)
        self.taken: Collection[str] = ()  # names of checkpoints that were passed over
        self.copier: copies.Copier | None = None
        self.copy: copies.Copy | None = None  # what this attempt goes on from, if not from a checkpoint on disk
        self.tokens = 0
        self.entries: list[ledger.Entry] = []
        self._slot = 0
        self._eval_metrics: tuple[int, dict[str, float]] = (-1, {})
        if not self.model_accepts_loss_kwargs:
            raise UserError(
                f"{type(self.model).__name__} does not take num_items_in_batch, so its loss cannot be normalised over "
                "the tokens of a step. Choose a model with a standard transformers forward."
            )

    # --- Data: already divided over the ranks, so accelerate must not divide it again.

    def get_train_dataloader(self) -> DataLoader:
        rank, world = self.args.process_index, self.args.world_size
        batches = TrainBatches(self.order, self.start_step, self.args.max_steps, rank, world)
        return self._loader(self.train_dataset, batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, world = self.args.process_index, self.args.world_size
        return self._loader(rows, EvalBatches(len(rows), self.args.eval_batch_size, rank, world))

    def _loader(self, rows: Any, batches: Any) -> DataLoader:
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=partial(collate, pad_token_id=_PADDING, layout=self.layout, picked=self.picked),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
        )

    # --- Steps

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, with randomness of its own: dropout is the same on whichever rank it runs."""
        if self._slot == 0:
            self.tokens = 0
            self._loss_before = self._tr_loss.clone()
        index = self._slot * self.args.world_size + self.args.process_index
        self._slot = (self._slot + 1) % self.args.gradient_accumulation_steps
        rows = [row for row in inputs.pop("rows").tolist() if row != MASKED]
        tokens = int(inputs.pop("tokens"))
        if rows:
            self.entries.append((self.state.global_step, index, rows))
            self.tokens += tokens
        reseed(self.order.seed, self.state.global_step, index)
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Stop before the optimizer step on a NaN or infinite gradient, or leave the step out if that is allowed.

        The norm is global, so all ranks do the same. Stock Trainer would log the loss as 0.0, write the NaN into the
        weights and save them.
        """
        self.saver.wait_copied()  # both read what the optimizer is about to change
        if self.copier:
            self.copier.wait_read()
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not np.isfinite(float(norm)):
            step, sequences = self.state.global_step, cast(Rows, self.train_dataset)
            entries = [entry for part in checkpoint.gather(self.entries) for entry in part if entry[0] == step]
            rows = sorted(source for _, _, rows in entries for row in rows for source in sequences.sources(row))
            text = (
                f"The gradient of step {step + 1} is {float(norm)}; nothing of that step was kept. Its samples are the "
                f"source rows {rows} (see `row` in training.jsonl)."
            )
            self.skipped = [*(self.skipped if step in self.skipped else []), step + 1]
            if not self.skip_non_finite or len(self.skipped) == MOST_SKIPPED:
                raise NonFiniteError(f"{text} Look at them, lower --learning_rate, or try --dtype float32.")
            return self._leave_out(model, text)
        return norm

    def _leave_out(self, model: Any, text: str) -> None:
        """No gradients: the optimizer then changes neither weights nor its own state. The loss is not logged."""
        for parameter in model.parameters():
            parameter.grad = None
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1  # the mean of the logged steps has one less
        if self.is_world_process_zero() and self.mailbox is not None:
            self.mailbox.put.remote({"kind": "note", "text": text, "skipped_step": self.skipped[-1]})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Without empty groups: LoRA leaves the no-decay one empty, and a flattened load reads each group's first."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # --- Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss per trained token over all rows. Stock Trainer averages batch means, which depends on batching."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        # Summed in float64 on the host, so that the division over workers changes only the last digits.
        total, tokens, rows = 0.0, 0, 0
        for inputs in dataloader:
            rows += int((inputs.pop("rows") != MASKED).sum())
            del inputs["tokens"]
            count = int((inputs["labels"][:, 1:] != IGNORE).sum())
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.model_wrapped(**self._prepare_inputs(inputs)).loss
            if count:  # the loss of a fully masked batch is NaN: a mean of nothing
                total += float(loss) * count
                tokens += count
        sums = torch.tensor([total, tokens, rows], dtype=torch.float64, device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        model.train(was_training)
        for module in model.modules():  # without a backward pass, the root's weights stay gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        total, tokens, rows = sums.tolist()
        loss = total / max(tokens, 1)
        if not np.isfinite(loss):  # the weights are finite, and of no use: nothing more of them is saved
            raise NonFiniteError(
                f"The evaluation loss after step {self.state.global_step} is {loss}. Lower --learning_rate, or try "
                "--dtype float32; the checkpoints before are as they were."
            )
        metrics = {f"{metric_key_prefix}_loss": loss}
        self._eval_metrics = (self.state.global_step, metrics)
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=int(rows))

    # --- Checkpoints: the library refuses to write those of a model that was sharded at load.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Begin the checkpoint of this step, with the ledger of what it consumed since the one before."""
        step = self.state.global_step
        position = {
            "step": step,
            "samples": step * self.order.micro_batches * self.order.batch,
            "seed": self.order.seed,
            "rng": "reseeded from (seed, step, micro-batch); there is no other state",
        }
        evaluated, metrics = self._eval_metrics
        about = {
            "step": step,
            "metrics": metrics if evaluated == step else {},
            "world_size": self.args.world_size,
            "config_fingerprint": self.fingerprint,
        }
        began = time.perf_counter()
        taken = checkpoint.snapshot(
            self.model, self.plain_optimizer(), self.lr_scheduler, self.state_to_save(), position
        )
        entries = self.entries_since_checkpoint()
        listed_s = time.perf_counter() - began
        self.saver.save(checkpoint_path(self.run.path, step, self.taken), taken, entries, about)
        self.saver.stall_s += listed_s

    def state_to_save(self) -> Any:
        """The library's TrainerState, with the state of its callbacks."""
        states: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if hasattr(callback, "state"):
                states[type(callback).__name__] = callback.state()
        return self.state

    def about_copy(self) -> dict[str, Any]:
        """What a copy needs besides tensors. Of the log only its end, which grows with the run."""
        state = dataclasses.replace(self.state_to_save(), log_history=self.state.log_history[-_LOG_IN_COPIES:])
        return {
            "state": checkpoint.state_text(state),
            "scheduler": cast(Any, self.lr_scheduler).state_dict(),
            "committed": self.saver.committed,
            "entries": self.entries_since_checkpoint(),
        }

    def entries_since_checkpoint(self) -> list[ledger.Entry]:
        """What this rank consumed since the last complete checkpoint; what is older is in the ledger on disk."""
        self.entries = [entry for entry in self.entries if entry[0] >= self.saver.committed]
        return list(self.entries)

    def plain_optimizer(self) -> Any:
        """Without the library's wrapper, which torch's state-dict functions do not know."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing left to do: the model was built from the checkpoint's weights."""

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if self.copy is not None:
            self.copy.load(self.model, self.plain_optimizer(), self.lr_scheduler)
            shutil.rmtree(self.copy.folder, ignore_errors=True)  # the library has read the trainer's state before
        elif checkpoint_path is not None:
            checkpoint.load_optimizer(Path(checkpoint_path), self.model, self.plain_optimizer(), self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: each micro-batch reseeds."""


def training_arguments(config: Config, run: Run, placement: Placement, accumulation: int) -> TrainingArguments:
    """The library's arguments for `config`; `accumulation` is micro-batches per rank and step."""
    scheduler: str = config.lr_scheduler_type
    scheduler_options: dict[str, float] = {}
    if scheduler == "cosine" and config.min_learning_rate > 0:  # the plain one ends at 0
        scheduler, scheduler_options = "cosine_with_min_lr", {"min_lr": config.min_learning_rate}
    warmup = config.warmup_steps
    cpus = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)  # Ray sets it to what the worker reserved
    os.environ["TENSORBOARD_LOGGING_DIR"] = config.logging_dir or str(run.here / "tensorboard")
    return TrainingArguments(
        output_dir=str(run.here),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup_ratio * config.max_steps) if warmup is None else warmup,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=scheduler_options,
        optim=config.optim,
        bf16=placement.dtype == torch.bfloat16,
        use_liger_kernel=config.use_liger_kernel,
        use_cpu=placement.device.type == "cpu",
        seed=config.seed,
        ddp_find_unused_parameters=False,
        ddp_timeout=config.torch_timeout_s,
        dataloader_num_workers=min(config.dataloader_num_workers, cpus - 1),
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.evaluates else "no",
        eval_steps=config.eval_steps or None,
        metric_for_best_model=METRIC,
        greater_is_better=False,
        save_strategy="no",  # callbacks ask for checkpoints, and ours writes them
        ignore_data_skip=True,  # the loader starts at the right step by itself
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=True,
        report_to=extras.trackers(config),
        run_name=run.name,
    )
