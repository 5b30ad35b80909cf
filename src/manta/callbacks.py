"""What happens around the training loop: when to save, when to stop, what to tell Ray and the driver."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manta import storage
from manta.runs import METRIC, newest_path

if TYPE_CHECKING:
    from manta.trainer import MantaTrainer


class SaveOnBestMetricCallback(TrainerCallback):
    """Ask for a checkpoint when an evaluation is the best so far."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        value = kwargs["metrics"].get(args.metric_for_best_model or METRIC)
        if value is None:
            return
        best = state.best_metric
        if best is None or (value > best if args.greater_is_better else value < best):
            control.should_save = True


class StopOnRequestCallback(TrainerCallback):
    """Stop after the step at which all ranks know that the driver was asked to end (SIGTERM); the save comes with it.

    Rank 0 looks whether its last question to the mailbox has been answered, and never waits for it.
    """

    def __init__(self, mailbox: Any):
        self.mailbox = mailbox
        self.asked: Any = None
        self.group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if dist.is_initialized() and dist.get_backend() != "gloo":  # a word between hosts need not wait for the GPU
            self.group = dist.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stop = torch.tensor([self._is_asked_to_stop() if args.process_index == 0 else False], dtype=torch.uint8)
        if dist.is_initialized():
            dist.broadcast(stop, src=0, group=self.group)
        if stop.item():
            control.should_training_stop = True

    def _is_asked_to_stop(self) -> bool:
        import ray

        if self.mailbox is None:
            return False
        if self.asked is None:
            self.asked = self.mailbox.is_stop_wanted.remote()
        answered, _ = ray.wait([self.asked], timeout=0)
        if not answered:
            return False
        answer, self.asked = self.asked, None
        return ray.get(answer)


class SaveForResumeCallback(TrainerCallback):
    """Ask for a checkpoint every `save_steps` and at the end, better or not: what a restart goes on from.

    With `stop_at_step`, also save there and leave.
    """

    def __init__(self, save_steps: int, stop_at_step: int | None, evaluate_at_end: bool):
        self.save_steps, self.stop_at_step, self.evaluate_at_end = save_steps, stop_at_step, evaluate_at_end

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if self.stop_at_step and state.global_step >= self.stop_at_step:
            control.should_training_stop = True
        if last or control.should_training_stop or state.global_step % self.save_steps == 0:
            control.should_save = True
        if last and self.evaluate_at_end:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_training_stop:  # early stopping, which stands before this callback
            control.should_save = True


class RayTrainReportCallback(TrainerCallback):
    """Register each checkpoint with Ray Train, which then resumes from it and deletes old ones.

    Collective: all ranks report, in the same order. The files are already in the run's folder, complete and closed by
    their manifest, so nothing is copied; Ray's own callback of this name makes every rank upload a whole checkpoint.
    `run` is the run's folder, if that is not the trainer's output_dir.
    """

    def __init__(self, run: Path | None = None):
        self.run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from ray import train

        path = newest_path(self.run or Path(args.output_dir or "."), state.global_step)
        metrics: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch}
        for log in state.log_history:
            if log.get("step") == state.global_step:
                metrics |= {key: value for key, value in log.items() if key in ("loss", METRIC)}
        train.report(
            metrics,
            checkpoint=train.Checkpoint(*storage.arrow(path)),
            checkpoint_dir_name=path.name,
            checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD,
        )


class ProgressCallback(TrainerCallback):
    """Send steps, log lines and saves to the driver's mailbox, without waiting for it."""

    def __init__(self, mailbox: Any, trainer: MantaTrainer, attempt: int):
        self.mailbox, self.trainer, self.attempt = mailbox, trainer, attempt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The library counts epochs from this call's own loader, which starts anew after a resume.
        state.epoch = round(self.trainer.order.epochs(state.global_step), 4)
        self._send(kind="step", step=state.global_step, rank=args.process_index, tokens=self.trainer.tokens)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            plain = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            self._send(kind="log", step=state.global_step, attempt=self.attempt, **plain)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._send(kind="checkpoint", step=state.global_step, attempt=self.attempt)

    def _send(self, **message: Any) -> None:
        if self.mailbox is not None:
            self.mailbox.put.remote(message)
