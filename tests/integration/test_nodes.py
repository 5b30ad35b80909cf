"""Nodes that are lost, come back, and are taken away: several raylets on this machine, each a node of Ray's.

Run by processes of their own, since each cluster needs a driver of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from manta import head, ledger
from manta.config import Config
from manta.outcome import ASKED_TO_STOP
from manta.runs import Run
from running import lines, logged, max_gap, order_of, small_config
from tiny import tiny_model

pytestmark = pytest.mark.slow

STEPS = 10_000  # more than are done: a test asks a run to stop when it has seen enough
SAVE = 100


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head node without room for workers, and one worker node."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "_system_config": head.SYSTEM, "include_dashboard": False},
    )
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def start(config: Config, address: str, folder: Path) -> subprocess.Popen[bytes]:
    recipe = folder / f"{config.run_name}.yaml"
    recipe.write_text(config.dump())
    command = [sys.executable, "-m", "manta", "train", "--config", str(recipe), "--ray_address", address]
    with (folder / f"{config.run_name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def wait_for(condition: Callable[[], Any], driver: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None and time.monotonic() < limit, log.read_text()
        time.sleep(0.05)


def of_kind(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run.events_file) if event["kind"] == kind]


def step_of(run: Run, attempt: int) -> int:
    return max((line["step"] for line in lines(run.metrics_file) if line["attempt"] == attempt), default=0)


def config_in(folder: Path, name: str, **settings: Any) -> Config:
    if not (folder / "base").exists():
        tiny_model(folder / "base")
    return small_config(
        folder,
        **{
            "run_name": name,
            "num_workers": "1:2",
            "nominal_workers": 2,
            "max_steps": STEPS,
            "save_steps": SAVE,
            "eval_steps": 0,
            "lora_dropout": 0.1,
            "resize_check_s": 3,
            "max_failures": 0,
            **settings,
        },
    )


def end(driver: subprocess.Popen[bytes]) -> None:
    if driver.poll() is None:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def test_a_node_is_lost_and_comes_back(nodes, tmp_path, record_property):
    """From 2 workers to 1 and back to 2, with the same samples and losses as one worker that nothing happens to."""
    lost = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    config = config_in(tmp_path, "elastic")
    run, log = Run(tmp_path / "results" / "elastic"), tmp_path / "elastic.log"
    driver = start(config, nodes.address, tmp_path)
    try:
        wait_for(lambda: step_of(run, 1) > SAVE, driver, log)
        at = time.time()
        os.kill(lost.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        wait_for(lambda: step_of(run, 2) > 0, driver, log)
        record_property("lost", f"{time.time() - at:.1f} s to the first new step")
        at = time.time()
        nodes.add_node(num_cpus=1)
        wait_for(lambda: step_of(run, 3) > 0, driver, log)
        record_property("back", f"{time.time() - at:.1f} s to the first new step")
        begun = step_of(run, 3)
        wait_for(lambda: step_of(run, 3) > begun + 20, driver, log)
        driver.terminate()
        assert driver.wait(timeout=60) == ASKED_TO_STOP, log.read_text()
    finally:
        end(driver)
    result = run.result()
    done = run.latest().step
    assert result["status"] == "stopped" and result["steps"] == done and result["world_sizes"] == [2, 1, 2]
    assert [failure["cause"] for failure in of_kind(run, "failure")] == ["node", "resize"]
    resumed = of_kind(run, "attempt")[2]["step"]  # saved for the planned resize; Ray takes a moment to end the workers
    record_property("resized", f"at step {step_of(run, 2)}, from {resumed}")
    assert step_of(run, 2) - resumed < 20
    order = order_of(config)
    expected = [(step, index, order.micro_batch(step, index)) for step in range(done) for index in range(4)]
    assert ledger.read(run.ledger, done) == expected

    alone = config_in(tmp_path, "alone", num_workers=1, stop_at_step=done)
    driver = start(alone, nodes.address, tmp_path)
    assert driver.wait(timeout=240) == 0, (tmp_path / "alone.log").read_text()
    gap = max_gap(logged(run, "loss"), logged(Run(tmp_path / "results" / "alone"), "loss"))
    record_property("gap", str(gap))
    assert gap <= 1e-5


def test_a_drained_node_costs_no_step_and_no_failure(nodes, tmp_path, record_property):
    leaving = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    config = config_in(tmp_path, "drained", save_steps=10 * STEPS)
    run, log = Run(tmp_path / "results" / "drained"), tmp_path / "drained.log"
    driver = start(config, nodes.address, tmp_path)
    try:
        wait_for(lambda: step_of(run, 1) > 5, driver, log)
        at = step_of(run, 1)
        drain(nodes.address, leaving.node_id, seconds=40)
        wait_for(lambda: run.latest(), driver, log, seconds=35)
        saved, done = run.latest().step, step_of(run, 1)
        record_property("saved", f"drained at step {at}, saved {saved}, done {done}")
        os.kill(leaving.all_processes["raylet"][0].process.pid, signal.SIGKILL)  # as the cloud does
        wait_for(lambda: step_of(run, 2) > 0, driver, log)
    finally:
        end(driver)
    assert saved >= at and saved < STEPS
    (failure,) = of_kind(run, "failure")
    assert failure["cause"] == "preemption"
    assert of_kind(run, "attempt")[1]["step"] >= saved


def drain(address: str, node_id: str, seconds: float) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + seconds) * 1000)
    accepted, message = GcsClient(address=address).drain_node(node_id, reason, "spot", deadline)
    assert accepted, message
