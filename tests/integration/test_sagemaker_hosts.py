"""Two containers of a training job, as network namespaces: names, addresses, SIGTERM, and no folder in common.

Their entry points are what SageMaker starts; the store and the secrets are moto's, over real HTTP. See `hosts.py`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

import hosts
from hosts import ROOT, WORK, Host, Network
from manta.launch.job import flags
from manta.launch.sagemaker import encoded
from running import CANARY, small_config, wait_for
from s3 import variables
from troubleshooting import check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(hosts.unavailable() is not None, reason=str(hosts.unavailable())),
]

FIRST, SECOND = "algo-1", "algo-2"
ADDRESS = {FIRST: "10.78.0.1", SECOND: "10.78.0.2"}
S3 = 5000
STEPS, STOPPED_AFTER = 600, 20  # more than are done between two lines of the display
PYTHON = sys.executable
RAY_SECRET = secrets.token_hex(32)

# What the store has, as JSON: read on a host, since the store cannot be reached from here.
REPORT = """
import json, sys, fsspec
from manta import runs
from manta.manifest import damage
run = runs.open_run("s3://store/runs/numbers")
latest = run.latest()
store = fsspec.filesystem("s3")
held = [name for name in store.find("store") if any(value.encode() in store.cat_file(name) for value in sys.argv[1:])]
print(json.dumps({
    "events": run.events(), "result": run.result(), "latest": latest.step, "secrets": held,
    "damage": damage(latest.path), "files": len(store.find("store")),
}))
"""
SETUP = """
import boto3, sys
boto3.client("s3").create_bucket(Bucket="store")
manager = boto3.client("secretsmanager")
manager.create_secret(Name="manta/hub", SecretString='{"token": "%s"}' % sys.argv[1])
manager.create_secret(Name="manta/ray", SecretString=sys.argv[2])
"""
# Stands for Slurm's own command, which the entry point of its nodes asks which nodes there are.
SCONTROL = """#!/bin/sh
case "$2" in
  job) echo "JobId=$3 ReqNodeList=(null) ExcNodeList=(null)"; echo "   NodeList=algo-[1-2]" ;;
  hostnames) printf 'algo-1\\nalgo-2\\n' ;;
esac
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    files = tmp_path_factory.mktemp("files")
    small_config(files)
    with hosts.network(**ADDRESS) as net:
        for name in ADDRESS:
            boot(net, name, files)
        net[FIRST].plug(net[SECOND])
        for host in net.hosts.values():  # gloo looks for the address where it is told to
            host.run(["ip", "address", "add", f"{host.address}/32", "dev", "eth0"])
        net[FIRST].popen([PYTHON, "-m", "moto.server", "-H", ADDRESS[FIRST], "-p", str(S3)], "moto.log")
        wait_for(lambda: port_is_open(net[FIRST], S3), 60)
        net[FIRST].run([PYTHON, "-c", SETUP, CANARY, RAY_SECRET])
        yield net


def boot(net: Network, name: str, files: Path) -> None:
    """As SageMaker: channels with the data and the base model on each host, and configuration files."""
    host = net.boot(name)
    channels = host.path("ml/input/data")
    shutil.copytree(files / "base", channels / "model")
    (channels / "training").mkdir()
    shutil.copy(files / "rows.jsonl", channels / "training")
    host.path("scontrol").write_text(SCONTROL)
    host.path("scontrol").chmod(0o755)
    host.environment |= {
        **variables(ADDRESS[FIRST], S3),
        "PYTHONPATH": f"{ROOT / 'src'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{WORK}:{os.environ['PATH']}",
        "MANTA_SAGEMAKER_ROOT": str(WORK / "ml"),
        "MANTA_RAY_START": "--num-cpus 1 --object-store-memory 200000000",
        "MANTA_SECRET_HF_TOKEN": "manta/hub#token",
        "MANTA_SECRET_RAY_AUTH_TOKEN": "manta/ray",
        "TRAINING_JOB_NAME": "numbers-1",
        "RAY_ENABLE_RECORD_TASK_LOGGING": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
    }
    host.environment.pop("HF_TOKEN", None)


def configure(host: Host, **settings: Any) -> None:
    """What SageMaker writes for a job with these hyperparameters, each one a text, as its estimators make them."""
    config = small_config(
        host.path("ml/input/data/training"),
        hf_model_id="as the channel says",
        run_name="numbers",
        results_dir="s3://store/runs",
        data_dir="prepared",
        max_steps=STEPS,
        save_steps=1000,
        eval_steps=0,
        nominal_workers=2,
        spare_workers=False,
        **settings,
    )
    about = host.path("ml/input/config")
    about.mkdir(parents=True, exist_ok=True)
    given = {name: encoded(value) for name, value in flags(config).items()}
    given["sagemaker_program"] = '"ray_train_sft.py"'
    resources = {"current_host": host.name, "hosts": [SECOND, FIRST], "network_interface_name": "eth0"}
    channels = {name: {"TrainingInputMode": "File"} for name in ("training", "model")}
    for name, value in {
        "resourceconfig": resources,
        "hyperparameters": given,
        "inputdataconfig": channels,
    }.items():
        (about / f"{name}.json").write_text(json.dumps(value))


def start(host: Host, log: str, *arguments: str, module: str = "sagemaker_entry", **environment: str) -> Popen[bytes]:
    for left in ("ml/output", "ml/model"):
        shutil.rmtree(host.path(left), ignore_errors=True)
    return host.popen([PYTHON, "-m", f"manta.launch.{module}", *arguments], log, **environment)


def signalled(host: Host, module: str) -> None:
    """SIGTERM to the container's first process, as SageMaker sends it; nsenter stands between it and us."""
    find = f"pgrep -of 'manta.launch.{module}' | xargs kill -TERM"
    host.run(["sh", "-c", find])


def port_is_open(host: Host, port: int) -> bool:
    probe = f"import socket; print(socket.socket().connect_ex(('{ADDRESS[FIRST]}', {port})))"
    return host.run([PYTHON, "-c", probe]).strip() == "0"


def text(host: Host, name: str) -> str:
    path = host.path(name)
    return path.read_text() if path.exists() else ""


def steps_in(log: str) -> int:
    return max((int(part.split("/")[0]) for part in log.split("train: step ")[1:]), default=0)


def end(process: Popen[bytes], host: Host, log: str, seconds: float) -> int:
    try:
        return process.wait(seconds)
    except Exception:
        print(text(host, log)[-4000:])
        raise


def test_a_host_that_does_not_come_ends_the_job_with_its_name(net):
    a, b = net[FIRST], net[SECOND]
    for host in (a, b):
        configure(host, num_workers=2)
    alone = start(b, "alone.log", "--join_timeout", "3")
    assert end(alone, b, "alone.log", 60) == 2
    assert "algo-1 (10.78.0.1) has no Ray on port 6379 after 3 s" in text(b, "ml/output/failure")
    check("Hosts of a job do not find each other", text(b, "ml/output/failure"))
    limit, begun = 20, time.monotonic()
    waiting = start(a, "waiting.log", "--join_timeout", str(limit))
    assert end(waiting, a, "waiting.log", 120) == 2
    assert limit <= time.monotonic() - begun < 4 * limit
    failure = text(a, "ml/output/failure")
    assert "1 of 2 hosts have joined Ray within 20 s; algo-2 did not come" in failure and len(failure) <= 1024
    assert failure in text(a, "waiting.log")


def test_a_drivers_error_is_the_jobs_and_the_other_host_ends_well(net):
    a, b = net[FIRST], net[SECOND]
    for host in (a, b):
        configure(host, num_workers=2, data={"input_template": "{questoin}"})
    head, other = start(a, "error.log"), start(b, "error.log")
    assert end(head, a, "error.log", 120) == 2, text(a, "error.log")
    assert end(other, b, "error.log", 60) == 0, text(b, "error.log")
    failure = text(a, "ml/output/failure")
    assert failure.startswith("manta: ") and "questoin" in failure and "question" in failure and len(failure) <= 1024
    assert "2 hosts in Ray: algo-1, algo-2" in text(a, "error.log")
    assert not b.path("ml/output/failure").exists()


def test_the_nodes_of_a_slurm_step_share_the_launcher_and_must_share_a_disk(net):
    """Each node has a folder of its own under the same name: that is found before a model is loaded."""
    a, b = net[FIRST], net[SECOND]
    data = [
        "--hfdc_dataset_name",
        str(WORK / "ml/input/data/training/rows.jsonl"),
        "--hfdc_input_template",
        "{question}",
    ]
    model = [
        "--hf_model_id",
        str(WORK / "ml/input/data/model"),
        "--hfdc_output_template",
        "{answer}",
        "--max_seq_length",
        "96",
        "--device",
        "cpu",
    ]
    command = [
        "--",
        "train",
        *data,
        *model,
        "--num_workers",
        "2",
        "--results_dir",
        str(WORK / "runs"),
        "--run_name",
        "disk",
    ]
    node = {"SLURM_JOB_ID": "7", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RAY_SECRET}
    head, other = (
        start(host, "slurm.log", *command, module="slurm_entry", SLURMD_NODENAME=host.name, **node) for host in (a, b)
    )
    assert end(head, a, "slurm.log", 120) == 2, text(a, "slurm.log")
    assert end(other, b, "slurm.log", 60) == 0, text(b, "slurm.log")
    said = text(a, "slurm.log")
    assert "2 hosts in Ray: algo-1, algo-2" in said
    assert f"node 10.78.0.2: {WORK}/runs does not hold what the driver wrote: it is another disk" in said
    assert "node 10.78.0.1" not in said and "Traceback" not in said
    assert not a.path("runs/disk").exists()

    a.path("stop").touch()  # by the script that has the signal
    node["MANTA_STOP_FILE"] = str(WORK / "stop")
    head = start(a, "stop.log", *command, module="slurm_entry", SLURMD_NODENAME=FIRST, **node)
    assert end(head, a, "stop.log", 60) == 75, text(a, "stop.log")


@pytest.mark.timeout(600)
def test_a_job_of_two_instances_stops_goes_on_and_loses_one(net, record_property):
    """SIGTERM to both saves; the same job again goes on from there, loses an instance, and ends with the model."""
    saved, saved_after = stopped(net)
    attempts = gone_on(net, saved)
    record_property("sagemaker", f"saved at step {saved}, {saved_after:.1f} s after SIGTERM; attempts from {attempts}")
    print(f"saved at step {saved}, {saved_after:.1f} s after SIGTERM; attempts from {attempts}")
    nothing_tells_a_secret(net)


def stopped(net: Network) -> tuple[int, float]:
    """The step that was saved, and the seconds until the job was over."""
    a, b = net[FIRST], net[SECOND]
    for host in (a, b):
        configure(host, num_workers=2)
    head, other = start(a, "stopped.log"), start(b, "stopped.log")
    wait_for(lambda: steps_in(text(a, "stopped.log")) >= STOPPED_AFTER or head.poll() is not None, 200)
    assert head.poll() is None, text(a, "stopped.log")
    for host in (a, b):
        signalled(host, "sagemaker_entry")
    asked = time.monotonic()
    assert end(head, a, "stopped.log", 110) == 75, text(a, "stopped.log")
    saved_after = time.monotonic() - asked
    assert end(other, b, "stopped.log", 60) == 0, text(b, "stopped.log")
    found = report(a)
    saved = found["latest"]
    assert STOPPED_AFTER <= saved < STEPS and found["damage"] is None
    assert found["result"]["status"] == "stopped" and found["result"]["steps"] == saved
    assert {worker["node"] for worker in found["events"][0]["workers"]} == set(ADDRESS.values())
    assert not a.path("ml/output/failure").exists() and not list(a.path("ml").glob("model/*"))
    return saved, saved_after


def gone_on(net: Network, saved: int) -> list[int]:
    """The steps from which the attempts of the run went on."""
    a, b = net[FIRST], net[SECOND]
    for host in (a, b):
        shutil.rmtree(host.path(".cache/manta"), ignore_errors=True)  # new instances have none
        configure(host, num_workers="1:2", resize_check_s=600)
    head, other = start(a, "again.log"), start(b, "again.log")
    wait_for(lambda: steps_in(text(a, "again.log")) > saved + 10 or head.poll() is not None, 200)
    assert head.poll() is None, text(a, "again.log")
    b.lose()
    assert end(head, a, "again.log", 250) == 0, text(a, "again.log")
    other.wait(30)
    found = report(a)
    attempts = [event for event in found["events"] if event["kind"] == "attempt"]
    assert [each["world_size"] for each in attempts] == [2, 2, 1]
    assert attempts[1]["step"] == saved and attempts[2]["step"] > saved
    assert found["result"]["status"] == "finished" and found["latest"] == STEPS
    loads = (
        "import sys; from transformers import AutoModelForCausalLM as M; print(type(M.from_pretrained(sys.argv[1])))"
    )
    assert "Qwen3ForCausalLM" in a.run([PYTHON, "-c", loads, str(WORK / "ml/model")])
    assert not a.path("ml/output/failure").exists()
    return [each["step"] for each in attempts]


def nothing_tells_a_secret(net: Network) -> None:
    a = net[FIRST]
    found = report(a)
    assert found["files"] > 10 and found["secrets"] == []
    places = (a.path("."), a.root / "tmp" / "ray")
    written = [file for place in places for file in place.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len(written) > 20 and any("worker" in file.name for file in written)
    assert [file for file in written if holds_secret(file)] == []


def report(host: Host) -> dict[str, Any]:
    return json.loads(host.run([PYTHON, "-c", REPORT, CANARY, RAY_SECRET]))


def holds_secret(file: Path) -> bool:
    content = file.read_bytes()
    return CANARY.encode() in content or RAY_SECRET.encode() in content
