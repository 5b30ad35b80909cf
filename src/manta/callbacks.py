"""What happens around the training loop: when to save, when to stop, what to tell Ray and the driver."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manta import preemption, spares, storage
from manta.progress import GO_ON, SAVE, STOP
from manta.runs import METRIC, Run, newest_path

if TYPE_CHECKING:
    from manta.saver import Saver
    from manta.trainer import MantaTrainer


class SaveOnBestMetricCallback(TrainerCallback):
    """Ask for a checkpoint when an evaluation is the best so far; with `every`, for one of each evaluation, whose worth
    is known only later."""

    def __init__(self, every: bool = False):
        self.every = every

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        value = kwargs["metrics"].get(args.metric_for_best_model or METRIC)
        if value is None:
            return
        best = state.best_metric
        if self.every or best is None or (value > best if args.greater_is_better else value < best):
            control.should_save = True


class StopOnRequestCallback(TrainerCallback):
    """Save, or save and stop, after the step at which all ranks know that it is wanted: because the driver was asked to
    end (SIGTERM), a node will be taken away, this worker was asked to end, or Ray is about to start more workers.

    The ranks agree on the strongest word of all. Rank 0 looks whether its last question to the mailbox has been
    answered, and never waits for it. A worker that was asked to end does so once a checkpoint of that step is whole.
    """

    def __init__(self, mailbox: Any, run: Run | None = None):
        self.mailbox, self.run = mailbox, run
        self.asked: Any = None
        self.group: Any = None
        self.leaving_nodes: list[str] = []
        self.save_before_leaving: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if dist.is_initialized() and dist.get_backend() != "gloo":  # a word between hosts need not wait for the GPU
            self.group = dist.new_group(backend="gloo")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.save_before_leaving is not None:
            latest = (self.run or Run(Path(args.output_dir or "."))).latest()
            if latest and latest.step >= self.save_before_leaving:
                preemption.leave(self.mailbox, args.process_index)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        leaving = preemption.asked_to_leave.is_set() and self.save_before_leaving is None
        heard = max(self._heard_by_the_first() if args.process_index == 0 else GO_ON, SAVE if leaving else GO_ON)
        word = torch.tensor([heard], dtype=torch.uint8)
        if dist.is_initialized():
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.group)
        if leaving:
            self.save_before_leaving = state.global_step
        control.should_save = control.should_save or word.item() == SAVE
        control.should_training_stop = control.should_training_stop or word.item() == STOP

    def _heard_by_the_first(self) -> int:
        """What the mailbox wants; a save too when the cluster says that other nodes than before will be taken away."""
        import ray

        if self.mailbox is None:
            return GO_ON
        word = GO_ON
        if (leaving := preemption.leaving_nodes()) != self.leaving_nodes:
            self.leaving_nodes, word = leaving, SAVE
            self.mailbox.preempted.remote(leaving)
        if self.asked is None:
            self.asked = self.mailbox.wanted.remote()
        answered, _ = ray.wait([self.asked], timeout=0)
        if not answered:
            return word
        answer, self.asked = self.asked, None
        return max(word, ray.get(answer))


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
    `saver` writes them in the background; without one they are there, in the trainer's output_dir, when this is called.
    With `validates`, Ray answers rows with those that were evaluated.
    """

    def __init__(self, saver: Saver | None = None, validates: bool = False):
        self.saver, self.validates = saver, validates

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = self.saver.run.path if self.saver else Path(args.output_dir or ".")
        step = state.global_step
        metrics: dict[str, Any] = {"step": step, "epoch": state.epoch}
        for log in state.log_history:
            if log.get("step") == step:
                metrics |= {key: value for key, value in log.items() if key in ("loss", METRIC)}

        validate = self.validates and METRIC in metrics
        if self.saver:
            self.saver.then(lambda: register(newest_path(folder, step), metrics, validate))
        else:
            register(newest_path(folder, step), metrics)


def register(checkpoint: Path, metrics: dict[str, Any], validate: bool = False) -> None:
    """Put a complete checkpoint on Ray's list. Collective."""
    from ray import train

    train.report(
        metrics,
        checkpoint=train.Checkpoint(*storage.arrow(checkpoint)),
        checkpoint_dir_name=checkpoint.name,
        checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD,
        validation=validate,
    )


def peak_memory() -> int:
    """Most bytes that this process has had: torch's of its GPU, or of the host's memory where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # Linux counts KiB


class StepCopyCallback(TrainerCallback):
    """Copy what is trained at the start of the next step, when the evaluation and the save of the last are done."""

    def __init__(self, trainer: MantaTrainer):
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if trainer.copier and state.global_step > trainer.start_step:
            trainer.copier.take(state.global_step, trainer.model, trainer.plain_optimizer(), trainer.about_copy)


class SpareWorkersCallback(TrainerCallback):
    """After the first step, when nothing waits any more, have spares for a restart; one worker of each node asks."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.asked and args.local_process_index == 0:
            spares.start(int(os.environ["LOCAL_WORLD_SIZE"]))
        self.asked = True


class ProgressCallback(TrainerCallback):
    """Send steps, log lines and saves to the driver's mailbox, without waiting for it."""

    def __init__(self, mailbox: Any, trainer: MantaTrainer, attempt: int):
        self.mailbox, self.trainer, self.attempt = mailbox, trainer, attempt

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.mailbox is not None:
            self.mailbox.entered_loop.remote()

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
            self._send(
                kind="log", step=state.global_step, attempt=self.attempt, **plain, peak_memory_bytes=peak_memory()
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            step, began, saver = state.global_step, time.time(), self.trainer.saver

            def tell() -> None:
                took = {
                    "save_stall_s": round(saver.stall_s, 4),
                    "save_s": round(time.time() - began + saver.stall_s, 4),
                }
                self._send(kind="checkpoint", step=step, attempt=self.attempt, **took)

            saver.then(tell)

    def _send(self, **message: Any) -> None:
        if self.mailbox is not None:
            self.mailbox.put.remote(message)
