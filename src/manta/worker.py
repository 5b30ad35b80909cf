"""What every training worker runs, as Ray Train starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray import train

from manta import checkpoint, copies, diagnosis, fit, loss, model, progress, quiet, storage
from manta.callbacks import (
    ProgressCallback,
    RayTrainReportCallback,
    SaveForResumeCallback,
    SaveOnBestMetricCallback,
    SpareWorkersCallback,
    StepCopyCallback,
    StopOnRequestCallback,
    register,
)
from manta.compiled import CompileCallback
from manta.config import Config
from manta.data import prepare
from manta.data.batches import Layout, Rows, SampleOrder
from manta.data.prepare import Prepared
from manta.errors import NonFiniteError, StorageError, UserError
from manta.runs import METRIC, Run, step_of
from manta.saver import Saver
from manta.trainer import MantaTrainer, reseed, training_arguments
from manta.versions import versions
from manta.watchdog import ProgressOfLoop, Watchdog


def train_func(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Train until the end of the run, from its newest copy or checkpoint if there is one.

    `config_dict` is `Config.to_dict()`. `manta train` adds `run` (the run's folder), `prepared` (the data's),
    `mailbox` (the actor that listens) and `lease` (the token that its checkpoints need); under a TorchTrainer of one's
    own, the run is Ray's folder of the experiment and rank 0 prepares the data if it is not there.

    Returns the metrics of the run; or `{"failure": message}` for an error that a restart would only repeat, which the
    driver raises, since Ray restarts the workers after every exception.
    """
    times = {"process": psutil.Process().create_time(), "train_func": time.time()}
    settings = dict(config_dict)
    given = {key: settings.pop(key, None) for key in ("run", "prepared", "mailbox", "lease")}
    config = Config.from_dict(settings)
    run = Run(storage.place(given["run"]) if given["run"] else _folder_of_experiment())
    mailbox = progress.find_mailbox(given["mailbox"])
    _log_to_file(run)
    try:
        prepared = Prepared(storage.place(given["prepared"])) if given["prepared"] else _prepare_here(config, run)
        with Watchdog(config.step_timeout_s, mailbox, train.get_context().get_world_rank()) as watchdog:
            return _train(config, run, prepared.fetched(), mailbox, given["lease"], watchdog, times)
    except (NonFiniteError, StorageError, UserError) as error:
        return {"failure": str(error)}
    except (RuntimeError, MemoryError) as error:
        _tell_if_out_of_memory(error, mailbox)
        raise
    finally:
        _hand_in(run)


def _train(
    config: Config,
    run: Run,
    prepared: Prepared,
    mailbox: Any,
    lease: str | None,
    watchdog: Watchdog,
    times: dict[str, float],
) -> dict[str, Any]:
    from ray.train.torch import get_device

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    native = all(checkpoint.gather(model.computes_bfloat16(device.type)))
    nodes = max(1, world // context.get_local_world_size())
    placement = model.Placement(device, world, nodes, model.compute_dtype(config, native, device.type))

    resume, damaged = _resume_point(run, mailbox, rank)
    if resume:
        storage.forget_others(resume, "checkpoint_*")
        resume = storage.fetch(resume)
    node = ray.get_runtime_context().get_node_id()
    names = copies.keepers(mailbox, checkpoint.gather(node)) if mailbox is not None else {}
    copy = copies.newest(list(names.values()), 0 if resume is None else step_of(resume))
    start = copy.step if copy else 0 if resume is None else step_of(resume)
    verdict = _announce(mailbox, rank, start, "copy" if copy else "checkpoint" if resume else "start")

    reseed(config.seed)
    divided = _divided(config, verdict["split"])
    if verdict["split"] > 1 and config.sharding_strategy == "auto":  # memory was less than estimated
        divided = divided.model_copy(update={"sharding_strategy": "FULL_SHARD"})
    weights = resume / model.WEIGHTS if resume else None
    network, layout, settled = fit.build(divided, placement, prepared.sequences, weights)
    fused = loss.settle(network, config, placement.device.type)
    _tell(mailbox, rank, network, placement, layout, fused, settled)
    committed = copy.committed if copy else start
    saver = Saver(run, committed, lease, config.async_save, partial(_note, mailbox, rank))
    trainer = make_trainer(config, run, prepared, network, saver, start, placement, layout, mailbox, verdict["split"])
    trainer.taken = damaged
    trainer.add_callback(ProgressCallback(mailbox, trainer, verdict["attempt"]))
    trainer.add_callback(ProgressOfLoop(watchdog))
    if config.torch_compile:
        trainer.add_callback(CompileCallback(network, trainer, partial(_note, mailbox, rank)))
    if config.spare_workers and mailbox is not None:
        trainer.add_callback(SpareWorkersCallback())
    if mailbox is not None and config.step_copies != "off":
        say = partial(_note, mailbox, rank)
        trainer.copier = copies.Copier(names, node, verdict["attempt"], config.step_copies, say)
    if copy:
        trainer.copy, trainer.entries = copy, copy.entries if rank == 0 else []

    if rank == 0 and mailbox is not None:
        mailbox.put.remote({"kind": "begun", "times": {**times, "model": time.time()}})
    begin = copy.folder if copy else resume
    outcome = trainer.train(resume_from_checkpoint=str(begin) if begin else None)
    saver.wait()
    if trainer.copier:
        trainer.copier.close()
    trainer.save_metrics("train", outcome.metrics)
    state = trainer.state
    return {
        "step": state.global_step,
        "epoch": state.epoch,
        "best_eval_loss": state.best_metric,
        "train_loss": next((log["loss"] for log in reversed(state.log_history) if "loss" in log), None),
        "sharding": checkpoint.gather(model.sharding(network)),
    }


def _tell(
    mailbox: Any,
    rank: int,
    network: Any,
    placement: model.Placement,
    layout: Layout,
    fused: bool,
    settled: fit.Settled,
) -> None:
    """What was chosen for this model and machine."""
    if rank or mailbox is None:
        return
    chosen = {
        "dtype": str(placement.dtype).removeprefix("torch."),
        "sharding_strategy": settled.config.sharding_strategy,
        "attention": network.config._attn_implementation,
        "layout": layout,
        "fused_loss": fused,
        "gradient_checkpointing": settled.recomputed,
    }
    sharded = f"{chosen['sharding_strategy']}, " * (placement.world_size > 1)
    padding = "padded" if layout == "padded" else "without padding"
    text = (
        f"{chosen['dtype']}, {sharded}{chosen['attention']} attention, batches {padding}, "
        f"{'fused loss, ' * fused}gradient checkpointing {chosen['gradient_checkpointing']} ({settled.why})"
    )
    mailbox.put.remote({"kind": "setup", "text": text, **chosen, "versions": versions()})


def _prepare_here(config: Config, run: Run) -> Prepared:
    prepared, parts = prepare.locate(config)
    if train.get_context().get_world_rank() == 0:
        if not prepare.is_ready(prepared):
            prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
        run.start(config, prepared.path)
    checkpoint.barrier()
    return prepared


def make_trainer(
    config: Config,
    run: Run,
    prepared: Prepared,
    network: Any,
    saver: Saver,
    start: int,
    placement: model.Placement,
    layout: Layout,
    mailbox: Any = None,
    split: int = 1,
) -> MantaTrainer:
    """The trainer over prepared data, with the callbacks that decide when to save and stop.

    `split` divides each micro-batch into as many smaller ones, for want of memory.
    """
    from transformers import EarlyStoppingCallback

    fingerprint, config = config.fingerprint(), _divided(config, split)
    training = Rows(prepared.tokenized("training").with_format("numpy"), prepared.packs())
    validation = None
    if config.evaluates:
        validation = prepared.tokenized("validation").with_format("numpy")
        picked = np.random.default_rng(config.seed).permutation(len(validation))[: config.max_eval_samples]
        picked = picked[np.argsort(prepared.lengths("validation")[0][picked], kind="stable")]  # little to pad
        validation = Rows(validation.select(picked, keep_in_memory=True))
    world = placement.world_size
    micro_batches = config.micro_batches(world)
    batch, lengths = config.per_device_train_batch_size, prepared.sequences
    order = SampleOrder(len(training), batch, micro_batches, config.seed, lengths)
    by_answers = config.metric_for_best != METRIC
    callbacks: list[Any] = [
        StopOnRequestCallback(mailbox, run),
        SaveOnBestMetricCallback(every=by_answers),
        SaveForResumeCallback(config.save_steps, config.stop_at_step, config.evaluates),
        RayTrainReportCallback(saver, validates=by_answers and mailbox is not None),
    ]
    if config.evaluates and config.early_stopping_patience and not by_answers:
        patience = EarlyStoppingCallback(config.early_stopping_patience, config.early_stopping_threshold)
        callbacks.insert(0, patience)
    trainer = MantaTrainer(
        model=network,
        args=training_arguments(config, run, placement, -(-micro_batches // world)),
        train_dataset=training,
        eval_dataset=validation,
        callbacks=callbacks,
        order=order,
        layout=layout,
        run=run,
        saver=saver,
        fingerprint=fingerprint,
        start_step=start,
        skip_non_finite=config.non_finite == "skip",
        mailbox=mailbox,
    )
    trainer.add_callback(StepCopyCallback(trainer))
    return trainer


def _divided(config: Config, split: int) -> Config:
    """The same samples per step, in micro-batches of a `split`-th of the rows, and `split` times as many."""
    return config.model_copy(
        update={
            "per_device_train_batch_size": config.per_device_train_batch_size // split,
            "gradient_accumulation_steps": config.gradient_accumulation_steps * split,
            "per_device_eval_batch_size": max(1, config.per_device_eval_batch_size // split),
        }
    )


def _log_to_file(run: Run) -> None:
    """Send this process's output, C libraries included, to the run's own log; the driver shows one display instead.

    With --verbose also to where it went, which Ray shows at the driver.
    """
    log_file = _log_file(run)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if quiet.is_verbose():  # a process of its own, which still writes what a crash leaves in the pipe
        log: Any = subprocess.Popen(["tee", "--append", log_file], stdin=subprocess.PIPE).stdin
    else:
        log = log_file.open("ab", buffering=0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)


def _log_file(run: Run) -> Path:
    return run.here / "logs" / f"worker-{train.get_context().get_world_rank():05d}.log"


def _hand_in(run: Run) -> None:
    """Upload what this worker wrote on its node, as far as the store takes it: a log is no reason to fail."""
    if not storage.is_remote(run.path):
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    log, results = _log_file(run), []
    if train.get_context().get_world_rank() == 0:
        written = [*run.here.glob("*.json"), *(run.here / "tensorboard").rglob("*")]
        results = [str(path.relative_to(run.here)) for path in written if path.is_file()]
    try:
        storage.upload(log.parent, run.logs / socket.gethostname(), [log.name])
        storage.upload(run.here, run.path, results)
    except OSError as error:
        print(f"Not uploaded: {error}", file=sys.stderr)


def _folder_of_experiment() -> Path:
    """Ray's folder of the experiment, where the workers were not started by `manta train`."""
    where = train.get_context().get_storage()
    kind = where.storage_filesystem.type_name
    scheme = {"s3": "s3://", "gcs": "gs://"}.get(kind, "")
    return storage.place(f"{scheme}{where.experiment_fs_path}")


def _resume_point(run: Run, mailbox: Any, rank: int) -> tuple[Path | None, Collection[str]]:
    """The newest checkpoint that is whole, and, with a note, those that are not.

    A manifest is what makes a checkpoint, also where the workers died before Ray had taken in their report of it.
    """
    known = {found.path.name: found.metrics for found in run.checkpoints()}
    committed = train.get_checkpoint()
    listed = Path(committed.path).name if committed else ""
    resume, damaged = checkpoint.choose([run.path / name for name in {*known, listed} - {""}])
    if resume and resume.name > listed:
        register(resume, {"step": step_of(resume), **known.get(resume.name, {})})
    if rank == 0:  # what a save of the attempt before was in the middle of
        run.remove_unfinished()
    for name, problem in damaged.items():
        _note(mailbox, rank, f"{name} is not used: {problem}")
    return resume, damaged


def _note(mailbox: Any, rank: int, text: str) -> None:
    if rank == 0 and mailbox is not None:
        mailbox.put.remote({"kind": "note", "text": text})


def _announce(mailbox: Any, rank: int, start: int, source: str) -> dict[str, Any]:
    """Begin an attempt; the mailbox's verdict on it, the same on all ranks.

    Raises UserError if what happened before is a reason not to go on.
    """
    node = {"node": ray.util.get_node_ip_address(), "node_id": ray.get_runtime_context().get_node_id()}
    about = checkpoint.gather({"rank": rank, "pid": os.getpid(), **node})
    verdict = {"attempt": 0, "split": 1, "stop": None}
    if rank == 0 and mailbox is not None:
        verdict = ray.get(mailbox.begin_attempt.remote(start, about, source=source))
    verdict = checkpoint.gather(verdict)[0]
    if verdict["stop"]:
        raise UserError(verdict["stop"])
    return verdict


def _tell_if_out_of_memory(error: BaseException, mailbox: Any) -> None:
    """Before the error is raised: the next attempt's micro-batches depend on it."""
    if mailbox is None or not diagnosis.is_out_of_memory(error):
        return
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    ray.get(mailbox.report.remote("out_of_memory", f"rank {train.get_context().get_world_rank()}: {text}"))
