"""The driver of a run: check everything, prepare data, let Ray Train run the workers, say how it ended."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import Any, cast

from rich.console import Console

from manta import cluster, heap, imports, manifest, nodes, quiet, runs, signals, snapshot, spares, storage
from manta.attempts import Attempts, Policy
from manta.config import Config
from manta.data import prepare
from manta.data.prepare import Prepared
from manta.errors import ConfigError, HeldError, InterruptedRunError, TrainingError
from manta.gauges import served
from manta.jsonl import append_json
from manta.lease import Lease, refuse_if_held
from manta.notify import Notifier
from manta.outcome import FAILED, FINISHED, summarize, why_failed
from manta.patience import Patience
from manta.phases import Phases
from manta.preparation import absolute, check_data, make
from manta.progress import Display, Monitor, open_mailbox, say
from manta.runs import METRIC, Run
from manta.status import Status


def train(config: Config, console: Console | None = None, title: str = "train") -> dict[str, Any]:
    """Run `config` to its end, from where it stands; returns what result.json holds.

    A finished run is left as it is. Raises UserError on anything wrong before a worker starts, and TrainingError when
    the workers fail for good.
    """
    console = console or Console(stderr=True, highlight=False)
    phases = Phases()
    storage.check(config.results_dir)
    config, run = resolve(config)
    finished = run.result()
    if finished and finished["status"] == FINISHED:
        say(console, f"{title}: {run.name} is finished already; --run_name starts another.")
        return finished

    status = Status(run.name)
    notifier = Notifier(config.notify, status, str(run.path), lambda text: say(console, f"{title}: {text}"))
    with served(status, config.metrics_host, config.metrics_port), notifier:
        try:
            result = _train(config, run, status, notifier, phases, console, title)
        except HeldError:  # the run itself goes on
            raise
        except BaseException as error:
            status.state = FAILED
            notifier.failed(error)
            raise
        notifier.ended(result)
        return result


def _train(
    config: Config, run: Run, status: Status, notifier: Notifier, phases: Phases, console: Console, title: str
) -> dict[str, Any]:
    with ExitStack() as stack:
        with phases("check"):
            refuse_if_held(run.path)
            cluster.check_device_before_start(config)
            ahead = stack.enter_context(cluster.begun(config, "manta.worker", "manta.controller"))
            with imports.quickly():
                from manta import architecture, extras, loss

                extras.check(config)
                architecture.check(config)
                loss.check(config)
            prepared, parts = prepare.locate(config)
            if run.config_file.exists() and run.prepared().name != prepared.path.name:
                raise ConfigError(
                    f"The data of the run {run.path} is not what it was started with: the source, the tokenizer or "
                    "Manta itself has changed since. Give --run_name for a new run."
                )
            job = None if prepare.is_ready(prepared) else prepare.open_job(config, prepared)
            if job is None:
                check_data(config, prepared, console)
        if job is not None:
            stack.callback(prepare.forget_sources, prepared)
        with phases("ray"), imports.beside("ray.train.torch"):
            stack.enter_context(cluster.connected(config, ahead))
        config = _place(config)
        nodes.check_storage([run.path.parent, prepared.path.parent])
        if job is not None:
            with phases("prepare"):
                make(config, prepared, parts, job, console)
            check_data(config, prepared, console)
        lease = stack.enter_context(Lease(run))
        run.start(config, prepared.path)
        run.remove_unfinished()
        for done in snapshot.repair(run):
            append_json(run.events_file, {"time": time.time(), "kind": "note", "text": done})
            say(console, f"{title}: {done}")
        if latest := run.latest():
            say(console, f"{title}: {run.name} goes on from {latest.path.name}")
        return _fit(config, run, prepared, lease, status, notifier, phases, console, title)


def resolve(config: Config) -> tuple[Config, Run]:
    """The config with absolute paths and the run's own name and batch size, and its run.

    Raises ConfigError if the run exists with settings that would train something else.
    """
    config = absolute(config)
    run = runs.of(config)
    config = config.model_copy(update={"run_name": run.name})
    if run.config_file.exists():
        if not config.resume_from_checkpoint:
            raise ConfigError(
                f"The run {run.path} has begun. Give --run_name for a new one, or leave out "
                "--resume_from_checkpoint false to go on with it."
            )
        before = run.config()
        if config.nominal_workers is None:
            config = config.model_copy(update={"nominal_workers": before.nominal_workers})
        if changed := before.differences(config):
            raise ConfigError(
                f"The run {run.path} was started with other settings ({'; '.join(changed)}). "
                "Give --run_name for a new run, or the old settings to go on with this one."
            )
    return config, run


def _place(config: Config) -> Config:
    """The config with device and workers as this cluster gives them. Raises UserError if it has no room."""
    on = cluster.device(config)
    if config.use_liger_kernel and on == "cpu":
        raise ConfigError("use_liger_kernel needs a GPU: its kernels do not run on CPU. Leave it out.")
    fewest, most = cluster.workers(config, on)
    each = cluster.resources_per_worker(config, on)
    cluster.check_fits(fewest, each, config.placement_strategy)
    if config.metric_for_best != METRIC:
        cluster.check_room_beside(most, each, _validator(config, on))
    return config.model_copy(
        update={
            "device": on,
            "num_workers": most if fewest == most else f"{fewest}:{most}",
            "nominal_workers": config.nominal_workers or most,
        }
    )


def _validator(config: Config, on: str) -> dict[str, float]:
    """What answering beside training reserves."""
    return config.validation_resources or cluster.resources_per_worker(config, on)


def max_steps(config: Config, sequences: int) -> int:
    """Steps of the run: as set, or what `num_train_epochs` comes to."""
    if config.num_train_epochs is None:
        return config.max_steps
    per_step = config.per_device_train_batch_size * config.micro_batches(1)
    return max(1, round(config.num_train_epochs * sequences / per_step))


def _fit(
    config: Config,
    run: Run,
    prepared: Prepared,
    lease: Lease,
    status: Status,
    notifier: Notifier,
    phases: Phases,
    console: Console,
    title: str,
) -> dict[str, Any]:
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    steps = max_steps(config, prepared.counts["training"]["sequences"])
    mailbox, name = open_mailbox(_attempts(config, run), config.metric_for_best, _patience(config, run))
    outcome: dict[str, Any] = {}
    interrupted = False
    fit_started = time.time()
    status.begin(steps, run.latest())
    with (
        Display(title, status, console) as display,
        quiet.captured(run.logs, console),
        Monitor(mailbox, run, status, display, notifier.take) as monitor,
        signals.stopping_on_sigterm(monitor.stop_wanted),
    ):
        try:
            with phases("fit"):
                result = _trainer(config.model_copy(update={"max_steps": steps}), run, prepared, lease, name).fit()
            outcome = result.return_value or {"failure": "the workers returned nothing"}
        except TrainingFailedError as error:
            from manta.controller import root_cause

            outcome = {"failure": root_cause(error)}
        except (KeyboardInterrupt, SystemExit, RayActorError) as error:  # on Ctrl-C Ray's controller ends in these ways
            interrupted = signals.was_interrupted(error)
            outcome = {"failure": "interrupted" if interrupted else f"Ray's controller was lost: {error}"}
    phases.until_first_step(fit_started, monitor.begun, monitor.first_step_time or time.time())
    summary = summarize(config, run, steps, outcome, monitor, phases.start, phases.seconds)
    manifest.write_json(run.result_file, summary)
    status.state = summary["status"]
    monitor.write_progress()
    if summary["status"] == FAILED:
        kind = InterruptedRunError if interrupted else TrainingError
        raise kind(why_failed(run, summary))
    return summary


def _attempts(config: Config, run: Run) -> Attempts:
    """As earlier drivers of the run left it."""
    before = [event for event in run.events() if event["kind"] == "attempt"]
    return Attempts(
        Policy(
            config.max_failures,
            config.max_node_losses,
            config.per_device_train_batch_size,
            halve=config.out_of_memory == "halve",
        ),
        number=len(before),
        split=before[-1].get("split", 1) if before else 1,
    )


def _patience(config: Config, run: Run) -> Patience | None:
    """As earlier drivers of the run left it; None where training itself knows the metric."""
    if config.metric_for_best == METRIC:
        return None
    patience = Patience(config.early_stopping_patience, config.early_stopping_threshold)
    for found in sorted(run.validations().values(), key=lambda event: event["step"]):
        patience.heard(found[config.metric_for_best])
    return patience


def _trainer(config: Config, run: Run, prepared: Prepared, lease: Lease, mailbox: str) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from manta.controller import Supervisor
    from manta.preemption import ListeningTorchConfig

    fewest, most = config.worker_range or (1, 1)
    on = config.device
    folder, filesystem = storage.arrow(run.path.parent)
    return TorchTrainer(
        cast(Any, _train_func),  # returning a value is documented, and missing from the annotation
        train_loop_config={
            **config.to_dict(),
            "run": str(run.path),
            "prepared": str(prepared.path),
            "mailbox": mailbox,
            "lease": lease.token,
        },
        scaling_config=ScalingConfig(
            use_gpu=on == "cuda",
            resources_per_worker=cluster.resources_per_worker(config, on),
            placement_strategy=config.placement_strategy,
            **cast(  # the annotations are those of Ray Train's first version
                Any,
                {
                    "num_workers": most if fewest == most else (fewest, most),
                    "elastic_resize_monitor_interval_s": config.resize_check_s,
                },
            ),
        ),
        **cast(Any, {"validation_config": _validation(config, run, prepared, mailbox)}),  # annotated in v2 only
        torch_config=ListeningTorchConfig(backend="nccl" if on == "cuda" else "gloo", timeout_s=config.torch_timeout_s),
        run_config=RunConfig(
            name=run.name,
            storage_path=folder,
            storage_filesystem=filesystem,
            # Without limits: the mailbox decides, by cause, and a lost node may take long to come back.
            failure_config=FailureConfig(
                **cast(Any, {"max_failures": -1, "max_preemption_failures": -1, "controller_failure_limit": -1})
            ),
            callbacks=cast(Any, [Supervisor(mailbox)]),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.save_total_limit,
                checkpoint_score_attribute=config.metric_for_best if config.evaluates else None,
                checkpoint_score_order="min" if config.metric_for_best == METRIC else "max",
            ),
            **cast(Any, {"worker_runtime_env": {"env_vars": _environment(config)}}),  # annotated only in its v2 class
        ),
    )


def _train_func(config_dict: dict[str, Any]) -> dict[str, Any]:
    """What a worker runs; the driver, which only names it, need not import what a worker does."""
    with imports.quickly():
        from manta.worker import train_func

    return train_func(config_dict)


def _environment(config: Config) -> dict[str, str]:
    """Variables of the workers' processes."""
    # Set before torch is imported, which a spare process does before Ray says what the worker reserves.
    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(cluster.threads(config))}
    environment |= heap.variables()
    if config.device == "cuda":
        environment["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment |= cluster.forwarded()
    return environment | spares.environment() if config.spare_workers else environment


def _validation(config: Config, run: Run, prepared: Prepared, mailbox: str) -> Any:
    if config.metric_for_best == METRIC:
        return None
    from manta import validation

    return validation.for_ray(config, run, prepared, mailbox, _validator(config, config.device))
