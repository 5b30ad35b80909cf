"""Faults of nodes: several Ray nodes on this machine, of which one is killed, comes back, or is told to leave."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Self

from faults.bench import Bench, Row
from faults.job import SECRETS, kill_marked, marks
from faults.workers import SIGTERM, end
from running import CANARY

LOSS = "node loss 2→1, node back 1→2"
# How soon the cluster takes a silent node for lost: what Manta sets for a cluster of its own.
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


class Nodes:
    """A Ray cluster of nodes with one CPU each, the first of which is the head's."""

    def __init__(self, count: int):
        from ray.cluster_utils import Cluster

        self.mark, self.folder = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="mf"))
        secrets = dict.fromkeys(SECRETS, CANARY)
        ours = {**marks(self.mark), "RAY_TMPDIR": str(self.folder), "RAY_worker_niceness": "0", **secrets}
        self.before = {name: os.environ.get(name) for name in ours}
        os.environ |= ours
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": HEALTH})
        self.nodes = [self.add() for _ in range(count - 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cluster.shutdown()
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        kill_marked(self.mark)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1)

    def kill(self, node: Any) -> float:
        """SIGKILL to every process of a node."""
        now = time.time()
        self.cluster.remove_node(node, allow_graceful=False)
        return now

    def drain(self, node_id: str, seconds: float) -> float:
        """Tell a node, as a cloud does with a preempted machine, that it ends in so many seconds."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        now = time.time()
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.cluster.address).drain_node(
            node_id, reason, "preempted by the test", int((now + seconds) * 1000)
        )
        assert accepted, why
        return now


def loss(bench: Bench) -> None:
    """Two nodes with a worker each, one killed, another one added: the same global batches on 2, 1, 2 workers."""
    rows: list[Row] = []
    with (
        Nodes(2) as nodes,
        bench.job("nodes", cluster=nodes.cluster.address, num_workers="1:2", resize_check_s=2) as job,
    ):
        job.ensure_running()
        with bench.row(LOSS, "SIGKILL of one of two raylets and its workers") as row:
            rows.append(row)
            job.steps_more(5)
            row.wasted_steps, row.seconds_to_new_step = job.recovery(nodes.kill(nodes.nodes.pop()), 150)
            row.must(job.events("attempt")[-1]["world_size"] == 1, f"{job.events('attempt')[-1]['world_size']} workers")
            row.must(row.wasted_steps <= 1, f"{row.wasted_steps} wasted steps")
        with bench.row(LOSS, "a second node is there again") as row:
            rows.append(row)
            job.steps_more(3)
            now = time.time()
            nodes.nodes.append(nodes.add())
            row.wasted_steps, row.seconds_to_new_step = job.recovery(now, 150)
            row.must(job.events("attempt")[-1]["world_size"] == 2, f"{job.events('attempt')[-1]['world_size']} workers")
            row.must(row.wasted_steps <= 1, f"{row.wasted_steps} wasted steps")
        end(bench, job, rows, weights=None)


def drain(bench: Bench) -> None:
    """Three nodes with a CPU each and two workers: the node of one is drained, and killed at its deadline."""
    grace = 8.0
    with Nodes(3) as nodes, bench.job("drain", cluster=nodes.cluster.address, save_steps=40, step_copies="off") as job:
        job.ensure_running()
        with bench.row(SIGTERM, "node drain, node killed at its deadline") as row:
            job.steps_more(5)
            workers = job.events("attempt")[-1]["workers"]
            others = {node.node_id: node for node in nodes.nodes}
            chosen = next(worker["node_id"] for worker in workers if worker["node_id"] in others)
            now = nodes.drain(chosen, grace)
            saved = job.until(lambda: next((e for e in job.events("checkpoint") if e["time"] > now), None), grace)
            row.notes.append(f"saved step {saved['step']} {saved['time'] - now:.1f} s after the notice")
            job.until(lambda: time.time() > now + grace, grace + 1)
            killed = nodes.kill(others[chosen])
            _, row.seconds_to_new_step = job.recovery(killed, 150)
            row.wasted_steps = max(0, saved["step"] - job.events("attempt")[-1]["step"])
            row.must(row.wasted_steps == 0, f"{row.wasted_steps} of the saved steps are wasted")
            row.must(job.events("attempt")[-1]["world_size"] == 2, "fewer workers")
            causes = [event["cause"] for event in job.events("failure")]
            row.must(causes == ["preemption"], f"counted as {causes}")
        end(bench, job, [row])
