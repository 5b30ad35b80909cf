"""Spare worker processes, started and with their imports done, so that a restart of the workers waits for neither.

A new worker gets an idle process of the same environment from Ray, if there is one that never had work. Ray starts a
process for a task that waits for one; the task is cancelled meanwhile, and the process stays, idle. Where that fails,
or Ray ends the idle process, a restart takes the longer way, and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import runpy
import sys
import threading
import time

IMPORTS = (
    "datasets",
    "peft",
    "ray.train.torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.trainer",
)
# A process takes about a second to start, so that a cancellation after this time finds it under way.
_UNDER_WAY_S = 0.5


def command() -> str:
    """How Ray starts a worker's process: this module's `main`, then Ray's own script. The same path on every node."""
    return f"{sys.executable} -m manta.spares"


def start(count: int) -> None:
    """Have `count` spares on this node, in the background. Called in a worker, whose environment they get."""
    threading.Thread(target=_start, args=(count,), name="manta-spares", daemon=True).start()


def _start(count: int) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(_nothing).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
    with contextlib.suppress(ray.exceptions.RayError):
        waiting = [task.remote() for _ in range(count)]
        time.sleep(_UNDER_WAY_S)
        for each in waiting:
            ray.cancel(each)


def _nothing() -> None:
    """Never runs."""


def main() -> None:
    """Import what a worker imports, then be a process of Ray's."""
    for name in IMPORTS:
        importlib.import_module(name)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
