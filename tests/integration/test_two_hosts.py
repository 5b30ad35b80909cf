"""Two hosts with addresses of their own and no folder in common: all they share is a network and an object store.

Host `a` has Ray's head, the driver and the S3 server, host `b` is a node of Ray. See `hosts.py` for what a host is.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hosts
from hosts import ROOT, WORK, Host, Network
from running import small_config, wait_for
from s3 import variables

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(hosts.unavailable() is not None, reason=str(hosts.unavailable())),
]

A, B = "10.77.0.1", "10.77.0.2"
RAY, S3 = 6379, 5000
STEPS, SAVE = 300, 20
TOKEN = secrets.token_hex(32)  # Ray's, the same on all hosts
PYTHON = sys.executable

# What is known of a run, as JSON: read on a host, since the store cannot be reached from here.
REPORT = """
import json, sys
from manta import ledger, runs
from manta.manifest import read_text
run = runs.open_run(sys.argv[1])
lines = read_text(run.metrics_file).splitlines() if run.metrics_file.exists() else []
latest = run.latest()
print(json.dumps({
    "events": run.events(), "metrics": [json.loads(line) for line in lines], "result": run.result(),
    "latest": latest.step if latest else 0,
    "ledger": ledger.read(run.ledger, latest.step) if latest else [],
}))
"""


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    """Ray over two hosts of one CPU each, and a store; the base model is on both, in folders of their own."""
    small_config(tmp_path)
    with hosts.network(a=A, b=B) as net:
        boot(net, "a", tmp_path)
        net["a"].popen([PYTHON, "-m", "moto.server", "-H", A, "-p", str(S3)], "s3.log")
        ray(net["a"], "--head", "--port", str(RAY), "--include-dashboard", "false")
        join(net, tmp_path)
        create = "import boto3; boto3.client('s3').create_bucket(Bucket='store')"
        wait_for(lambda: port_is_open(net["a"], S3), 60)
        net["a"].run([PYTHON, "-c", create])
        yield net


def boot(net: Network, name: str, files: Path) -> None:
    host = net.hosts.get(name) or net.boot(name)
    shutil.copytree(files / "base", host.path("base"))
    shutil.copy(files / "rows.jsonl", host.path("rows.jsonl"))
    host.environment |= {
        **variables(A, S3),
        "PYTHONPATH": f"{ROOT / 'src'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
        **{"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"},
        **{"RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "1000"},
        "RAY_ENABLE_RECORD_TASK_LOGGING": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
    }


def ray(host: Host, *arguments: str) -> None:
    command = [str(Path(PYTHON).parent / "ray"), "start", "--node-ip-address", host.address, "--num-cpus", "1"]
    host.run([*command, "--object-store-memory", "200000000", *arguments])


def join(net: Network, files: Path) -> None:
    """Host b, new or back again, joins the cable and the cluster."""
    if not net["b"].path("base").exists():
        boot(net, "b", files)
    net["a"].plug(net["b"])
    ray(net["b"], "--address", f"{A}:{RAY}")


def port_is_open(host: Host, port: int) -> bool:
    probe = f"import socket; print(socket.socket().connect_ex(('{host.address}', {port})))"
    return host.run([PYTHON, "-c", probe]).strip() == "0"


def start(host: Host, name: str, **settings: Any) -> Any:
    config = small_config(
        host.path("."),
        hf_model_id=str(WORK / "base"),
        data={"dataset_name": str(WORK / "rows.jsonl")},
        run_name=name,
        results_dir="s3://store/runs",
        data_dir="prepared",
        ray_address=f"{A}:{RAY}",
        max_steps=STEPS,
        save_steps=SAVE,
        eval_steps=150,
        early_stopping_patience=0,
        nominal_workers=2,
        **settings,
    )
    host.path(f"{name}.yaml").write_text(config.dump())
    return host.popen([PYTHON, "-m", "manta", "train", "--config", str(WORK / f"{name}.yaml")], f"{name}.log")


def report(host: Host, name: str) -> dict[str, Any]:
    return json.loads(host.run([PYTHON, "-c", REPORT, f"s3://store/runs/{name}"]))


def attempts(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in found["events"] if event["kind"] == "attempt"]


def finish(host: Host, name: str, driver: Any, seconds: float) -> dict[str, Any]:
    assert driver.wait(seconds) == 0, host.path(f"{name}.log").read_text()
    return report(host, name)


def logged(found: dict[str, Any], key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in found["metrics"] if key in line}


@pytest.mark.timeout(900)
def test_the_second_host_is_lost_and_comes_back(net, tmp_path, record_property):
    a = net["a"]
    undisturbed = finish(a, "undisturbed", start(a, "undisturbed", num_workers=2), 240)
    assert {worker["node"] for worker in attempts(undisturbed)[0]["workers"]} == {A, B}
    assert undisturbed["result"]["world_sizes"] == [2]

    driver = start(a, "lost", num_workers="1:2", resize_check_s=2)
    wait_for(lambda: reached(a, "lost", SAVE) or driver.poll() is not None, 120)
    assert driver.poll() is None, a.path("lost.log").read_text()
    net["b"].lose()
    lost = time.time()
    wait_for(lambda: len(attempts(report(a, "lost"))) == 2 or driver.poll() is not None, 120)
    net.boot("b")
    join(net, tmp_path)
    found = finish(a, "lost", driver, 300)

    first, second, third = attempts(found)
    assert [each["world_size"] for each in (first, second, third)] == [2, 1, 2]
    assert {worker["node"] for worker in second["workers"]} == {A}
    assert {worker["node"] for worker in third["workers"]} == {A, B}
    assert second["step"] >= SAVE and second["step"] < third["step"] < STEPS
    again = min(line["time"] for line in found["metrics"] if line["attempt"] == 2)
    assert found["ledger"] == undisturbed["ledger"] and len(found["ledger"]) == STEPS * 4
    gaps = {
        key: max(abs(logged(found, key)[step] - loss) for step, loss in logged(undisturbed, key).items())
        for key in ("loss", "eval_loss")
    }
    record_property("two_hosts", f"{gaps}; first new step {again - lost:.1f} s after the loss")
    print(gaps, f"first new step {again - lost:.1f} s after the loss", [each["step"] for each in attempts(found)])
    assert max(gaps.values()) <= 1e-5

    on_b = {path.name for path in net["b"].path(".").iterdir()}
    assert "runs" not in on_b and "results" not in on_b  # a cache of its own is all it has


def reached(host: Host, name: str, step: int) -> bool:
    listing = "import sys; from manta import runs; print(runs.open_run(sys.argv[1]).latest().step)"
    try:
        return int(host.run([PYTHON, "-c", listing, f"s3://store/runs/{name}"])) >= step
    except AssertionError:  # not begun
        return False
