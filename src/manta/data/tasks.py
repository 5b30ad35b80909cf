"""Who prepares which shards: this process, or tasks of Ray Data."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from manta import diagnosis, quiet
from manta.config import Config
from manta.data import shards
from manta.data.shards import Job
from manta.errors import StorageError, UserError

_SHARDS_A_TASK = 16


def here(config: Config, job: Job) -> Iterator[dict[str, Any]]:
    """Summaries of all shards, made one after the other in this process."""
    for shard in range(job.shards):
        yield shards.write_shard(job, shard)


def on_ray(config: Config, job: Job) -> Iterator[dict[str, Any]]:
    """Summaries of all shards, made by tasks of Ray Data on this node."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = context.verbose_stats_logs = quiet.is_verbose()
    if not quiet.is_verbose():
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # after the import, which configures it
    shared = ray.put(job)  # rows stay in their files: a task opens what it reads

    processes = min(job.shards, config.hf_dataset_config.num_proc)

    def work(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        gc.disable()  # rows and tokens make no cycles, and looking for some takes a tenth of the time
        try:
            for shard in range(task["first"], task["end"]):
                yield {"result": json.dumps(shards.write_shard(_fetched(shared), shard))}
        except UserError as error:  # which Ray would wrap in a traceback of its own
            yield {"result": json.dumps({"error": str(error)})}
        except OSError as error:
            if (message := diagnosis.explain(error)) is None:
                raise
            yield {"result": json.dumps({"failure": message})}
        finally:
            gc.enable()

    this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # the source need only exist on this node
    # Items and not a range, whose numbers would be made by tasks of their own.
    tasks = divide(job.shards, processes)
    results = ray.data.from_items(tasks, override_num_blocks=len(tasks)).flat_map(
        work, num_cpus=1, compute=ray.data.TaskPoolStrategy(processes), label_selector=this_node
    )
    for row in results.iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise UserError(result["error"])
        if "failure" in result:
            raise StorageError(result["failure"])
        yield result


@lru_cache(maxsize=1)
def _fetched(shared: Any) -> Job:
    """The job, once for all tasks of a process: it holds a whole vocabulary."""
    import ray

    job: Job = ray.get(shared)
    return job


def divide(count: int, processes: int) -> list[dict[str, int]]:
    """Shards [first, end) of each task: several, since a task costs Ray about as much as a shard costs us, and ever
    fewer towards the end, so that no process waits long for the last one."""
    tasks: list[dict[str, int]] = []
    first = 0
    while first < count:
        size = max(1, min(_SHARDS_A_TASK, (count - first) // (2 * processes)))
        tasks.append({"first": first, "end": first + size})
        first += size
    return tasks
