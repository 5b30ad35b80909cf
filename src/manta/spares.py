"""Spare worker processes, started and with their imports done, so that a restart of the workers waits for neither.

A new worker gets an idle process of the same environment from Ray, if there is one that never had work. Ray starts a
process for a task that waits for one; the task is cancelled meanwhile, and the process stays, idle. Where that fails,
or Ray ends the idle process, a restart takes the longer way, and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
import time

from manta import imports

# The name under which Ray itself hands `worker_process_setup_hook` on, which it lets only a whole job set.
_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
# A run that is over sooner needs no spare, and would share its processors with the imports of one.
_AFTER_S = 30.0
# A process takes about a second to start, so that a cancellation after this time finds it under way.
_UNDER_WAY_S = 0.5


def environment() -> dict[str, str]:
    """What makes a process of Ray's import ahead, before it has work: for a runtime environment's `env_vars`."""
    return {_HOOK: f"{__name__}.{preload.__name__}"}


def preload() -> None:
    """Import what a training worker imports."""
    imports.ahead("ray.train.torch")


def start(count: int) -> None:
    """Have `count` spares on this node, some time from now. Called in a worker, whose environment they get."""
    threading.Thread(target=_start, args=(count,), name="manta-spares", daemon=True).start()


def _start(count: int) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(_nothing).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
    time.sleep(_AFTER_S)
    with contextlib.suppress(ray.exceptions.RayError):
        waiting = [task.remote() for _ in range(count)]
        time.sleep(_UNDER_WAY_S)
        for each in waiting:
            ray.cancel(each)


def _nothing() -> None:
    """Never runs."""
