"""Manta's part in Ray Train's controller: tells the mailbox what failed, ends the run where a restart is of no use, and
lets workers save before Ray replaces them by more.

Ray's hooks for developers, as of 2.60: ray/train/v2/_internal/execution/callback.py. An exception raised in one of them
ends the run at once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, ResizingState

from manta.attempts import Cause
from manta.errors import TrainingError
from manta.progress import find_mailbox

SAVE_BEFORE_RESIZE_S = 30
_ANSWER_S = 30
_DEATH_IS_SEEN_S = 2

# What the others say when one worker is gone: never the reason.
_COLLATERAL = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|gloo|nccl|socket|recvValue|store.*(wait|get)|timed out|"
    r"process group .*(abort|destroy)",
    re.IGNORECASE,
)


class Supervisor(WorkerGroupCallback, ControllerCallback, ReportCallback):
    """`mailbox` is its name."""

    def __init__(self, mailbox: str):
        self.mailbox = mailbox
        self.number = 0  # of the group of workers
        self.group: Any = None
        self.known: set[int] = set()  # ranks whose failure was told
        self.resizing = self.checkpoint_came = False

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self.number += 1
        self.known, self.resizing = set(), False

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.group = worker_group

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        errors = dict(worker_group_status.errors)
        if errors.keys() - self.known:
            if all(_explain(rank, error)[1] for rank, error in errors.items()):
                errors |= self._dead(without=errors.keys())
            self.known |= errors.keys()
            self._tell(*explain(errors))

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self.resizing = self.resizing or isinstance(current_state, ResizingState)
        if isinstance(current_state, ReschedulingState):
            failure = getattr(current_state.training_failed_error, "controller_failure", None)
            if isinstance(failure, WorkerGroupStartupFailedError):
                self._tell("worker", one_line(failure.__cause__ or failure))

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        self.checkpoint_came = self.checkpoint_came or training_report.checkpoint is not None

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Ask for a checkpoint, and wait for it: Ray kills the workers right after this.

        Ray's controller is held up here, so that its own look at the workers, which takes in their reports, has to be
        made here too.
        """
        if not self.resizing or self.group is None:
            return
        self.resizing = self.checkpoint_came = False
        ray.get(find_mailbox(self.mailbox).want_save.remote(), timeout=_ANSWER_S)  # type: ignore[union-attr]
        limit = time.monotonic() + SAVE_BEFORE_RESIZE_S
        while not self.checkpoint_came and not self.known and time.monotonic() < limit:
            status = self.group.poll_status(timeout=0.25)
            if status.finished:
                return
            time.sleep(0.05)

    def _dead(self, without: Collection[int]) -> dict[int, Exception]:
        """The ranks whose process is gone: a broken connection is often told of before Ray has seen the death."""
        limit = time.monotonic() + _DEATH_IS_SEEN_S
        others = [(rank, one.actor) for rank, one in enumerate(self.group.get_workers()) if rank not in without]
        found: dict[int, Exception] = {}
        while others and not found and time.monotonic() < limit:
            time.sleep(0.1)
            asked = {actor.__ray_ready__.remote(): rank for rank, actor in others}
            for answer in ray.wait(list(asked), num_returns=len(asked), timeout=_DEATH_IS_SEEN_S)[0]:
                try:
                    ray.get(answer)
                except RayActorError as error:
                    found[asked[answer]] = WorkerHealthCheckFailedError("its process is gone", error)
        return found

    def _tell(self, cause: Cause, text: str) -> None:
        mailbox: Any = find_mailbox(self.mailbox)
        if stop := ray.get(mailbox.failed.remote(self.number, cause, text), timeout=_ANSWER_S):
            raise TrainingError(stop)


def explain(errors: dict[int, Exception]) -> tuple[Cause, str]:
    """What happened, from the exceptions of all ranks that have one: those of a lost connection come last."""
    found = [_explain(rank, error) for rank, error in sorted(errors.items())]
    order = ("error", "preemption", "node", "hang", "worker")
    cause, _, text = min(found, key=lambda one: (order.index(one[0]), one[1]))
    return cause, text


def _explain(rank: int, error: Exception) -> tuple[Cause, bool, str]:
    """Cause, whether it only follows from something else, and text."""
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "hang", False, f"rank {rank} answered no health check for a long time (frozen?)"
    if isinstance(error, WorkerHealthCheckFailedError):
        failure = error.health_check_failure
        if getattr(failure, "preempted", False):
            return "preemption", False, f"the node of rank {rank} was taken away"
        if isinstance(failure, RayActorError):
            node = "node" in str(failure) and re.search(r"its node|node (has )?died|node was", str(failure))
            return ("node" if node else "worker"), False, _death(rank, str(failure))
        return "error", False, f"rank {rank}: {one_line(failure)}"
    text = f"rank {rank}: {one_line(error)}"
    if _COLLATERAL.search(str(error)):
        return "worker", True, f"a worker is gone; {text}"
    return "error", False, text


def _death(rank: int, said: str) -> str:
    pid = re.search(r"pid: (\d+)", said)
    detail = re.search(r"exit type: (\w+)", said)
    process = f" (process {pid.group(1)}{', ' + detail.group(1) if detail else ''})" if pid else ""
    return f"the process of rank {rank} died{process}"


def one_line(error: BaseException) -> str:
    """Type and last line of the exception at the root of `error`."""
    while (cause := error.__cause__ or getattr(error, "cause", None)) is not None and cause is not error:
        error = cause
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[-1] if text else 'no message'}"


def root_cause(error: Exception) -> str:
    """Why `fit` raised: as the mailbox judged it, or the first worker's exception."""
    failure = getattr(error, "controller_failure", None)
    if isinstance(failure, TrainingError):
        return str(failure)
    failures = getattr(error, "worker_failures", None) or {}
    return explain(failures)[1] if failures else one_line(failure or error)
