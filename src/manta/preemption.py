"""Notices that a node or a worker is about to be taken away: Ray's word on drained nodes, and SIGTERM to a worker."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

# Time for the process group of a dead or hung attempt to end by itself before its workers are killed; Ray's default
# of 30 s is added to each recovery from a hang.
_SHUTDOWN = ("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
_ANSWER_S = 5

asked_to_leave = threading.Event()


def listen() -> None:
    """Let the first SIGTERM to this process ask for a save; a second one ends it. Main thread only.

    Ray's own handler exits at once, which costs all that was not saved.
    """

    def ask(number: int, frame: Any) -> None:
        asked_to_leave.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ask)


class Backend(_TorchBackend):
    """Ray's, and workers that hear SIGTERM: the training loop has a thread of its own, which can set no handler."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(listen)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        os.environ.setdefault(*_SHUTDOWN)  # read by Ray here, in its controller's process
        super().on_shutdown(worker_group, backend_config)


class ListeningTorchConfig(TorchConfig):
    """Ray's TorchConfig with workers that hear SIGTERM."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


def leaving_nodes() -> list[str]:
    """Nodes of this run that the cluster will take away, as Ray has told this process.

    `ray.train.get_preemption_info()` says the same, and is a collective: too slow to ask after every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return list(info.preempted_node_ids) if info else []


def leave(mailbox: Any, rank: int) -> None:
    """End this process, after the driver knows why and Ray's controller has fetched the last checkpoint's report."""
    import ray
    from ray.train.v2._internal.execution.context import get_train_context

    reports, limit = get_train_context().get_result_queue(), time.monotonic() + _ANSWER_S
    while not reports.empty() and time.monotonic() < limit:
        time.sleep(0.05)
    if mailbox is not None:
        text = f"rank {rank} was asked to leave (SIGTERM) and did so after a save"
        ray.wait([mailbox.report.remote("preemption", text)], timeout=_ANSWER_S)
    os._exit(0)
