"""Attempts of one run on Ray clusters, as KubeRay makes them: the RayJob's own command by Ray's Jobs API, with a token.

A repeated attempt has a new cluster and the same run; one that overlaps with an attempt that still lives is refused.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import yaml
from click.testing import CliRunner

from manta import manifest
from manta.cli import main
from manta.launch import kuberay
from manta.launch.config import LaunchConfig
from manta.runs import Run
from ports import free_ports
from running import CANARY, small_config, wait_for

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
STEPS, SAVE = 150, 10
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


class Cluster:
    """A Ray of its own on this machine, with Ray's Jobs API; `environment` is that of its hosts."""

    def __init__(self, folder: Path, token: str, **environment: str):
        gcs, client, agent, self.port = free_ports(4)
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus", "2", "--port", str(gcs)]
        command += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
        command += ["--dashboard-port", str(self.port), "--object-store-memory", "200000000", "--temp-dir", folder]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "HF_TOKEN": CANARY, "CUDA_VISIBLE_DEVICES": ""},
            **{"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"},
            **environment,
        }
        self.headers = {"Authorization": f"Bearer {token}"}
        self.log = folder.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=folder.parent)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> JobSubmissionClient:
        """With this cluster's token; Ray reads its variables once a process, and other tests share this one."""
        from ray.job_submission import JobSubmissionClient

        assert self.process.poll() is None, self.log.read_text()
        return JobSubmissionClient(self.address, headers=self.headers)

    def end(self) -> None:
        """At once, as an operator deletes a cluster whose time is over."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=20)
        self.process.wait(20)


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster whose hosts have the given variables; it ends with the test, if not before."""
    token = secrets.token_hex(32)
    started: list[Cluster] = []

    def one(name: str, **environment: str) -> Cluster:
        (Path(short) / name).mkdir()
        started.append(Cluster(Path(short) / name, token, **environment))
        wait_for(lambda: answers(started[-1]), 90)
        return started[-1]

    with tempfile.TemporaryDirectory(prefix="mj", dir="/tmp", ignore_cleanup_errors=True) as short:  # for sockets
        try:
            yield one
        finally:
            for cluster in started:
                cluster.end()


def submit(cluster: Cluster, number: str, entrypoint: str) -> str:
    """As the pod does that KubeRay submits a job by: the command, as it is, in a line of bash."""
    line = f"ray job submit --address {cluster.address} --submission-id {number} --no-wait -- {entrypoint} ;"
    subprocess.run(["bash", "-c", line], env=cluster.environment, check=True, capture_output=True, timeout=60)
    return number


def answers(cluster: Cluster) -> bool:
    try:
        cluster.client().list_jobs()
    except (ConnectionError, RuntimeError):
        return False
    return True


@pytest.mark.timeout(420)
def test_a_repeated_attempt_goes_on_and_an_overlapping_one_is_refused(start, tmp_path, record_property):
    config = small_config(
        tmp_path,
        run_name="numbers",
        max_steps=STEPS,
        save_steps=SAVE,
        eval_steps=0,
        nominal_workers=2,
        num_workers=2,
        spare_workers=False,
    )
    launch = LaunchConfig.from_dict(
        {
            "image": "manta",
            "kubernetes": {"gpus": 0, "claim": "data", "mount_path": str(tmp_path), "memory": "4Gi", "cpus": 2},
        }
    )
    spec = yaml.safe_load(kuberay.render(config, launch)["rayjob.yaml"])["spec"]
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    variables = {each["name"]: each["value"] for each in pod["env"] if each["name"] in ("MANTA_RECIPE", "MANTA_EXPORT")}
    first = start("a", **variables)
    run = Run(tmp_path / "results" / "numbers")

    def reached(step: int) -> bool:
        latest = run.latest()
        return latest is not None and latest.step >= step

    here = first.client()
    attempt = submit(first, "attempt-1", spec["entrypoint"])
    wait_for(lambda: reached(SAVE) or here.get_job_status(attempt) in ENDED, 120)
    assert here.get_job_status(attempt) == "RUNNING", here.get_job_logs(attempt)

    overlapping = submit(first, "attempt-2", spec["entrypoint"])
    wait_for(lambda: here.get_job_status(overlapping) in ENDED, 90)
    logs = here.get_job_logs(overlapping)
    assert here.get_job_status(overlapping) == "FAILED" and f"Another driver is training {run.path}" in logs, logs
    assert here.get_job_status(attempt) == "RUNNING"

    first.end()
    second = start("b", **variables)
    there = second.client()
    saved = run.latest()
    assert saved is not None and saved.step < STEPS, "it was over before its cluster was ended"
    recipe = tmp_path / "recipe.yaml"
    about = {"ray": {"address": second.address}, "secrets": {"HF_TOKEN": "hub"}, "env": {"NCCL_DEBUG": "WARN"}}
    recipe.write_text(config.dump() + yaml.safe_dump({"launch": about}))
    command = [BIN / "manta", "launch", "ray", "--config", recipe]
    done = subprocess.run(command, env=second.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    number = done.stdout.splitlines()[0]
    wait_for(lambda: there.get_job_status(number) in ENDED, 180)
    logs = there.get_job_logs(number)
    assert there.get_job_status(number) == "SUCCEEDED", logs
    attempts = [event for event in run.events() if event["kind"] == "attempt"]
    assert len(attempts) == 2 and attempts[1]["step"] == saved.step
    result = run.result()
    assert result and result["status"] == "finished" and result["steps"] == STEPS
    assert manifest.damage(run.export) is None  # merged by the same job
    record_property("attempts", [each["step"] for each in attempts])
    print("attempts began at steps", [each["step"] for each in attempts])

    assert CANARY not in logs + done.stdout + done.stderr
    info = there.get_job_info(number)
    assert info.runtime_env["env_vars"] == {"NCCL_DEBUG": "WARN"} and CANARY not in str(info)
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert len(files) > 10 and not [file for file in files if CANARY.encode() in file.read_bytes()]


def test_a_cluster_that_is_not_there_is_a_message(tmp_path):
    (port,) = free_ports(1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("launch: {}")
    arguments = ["launch", "ray", "--config", str(recipe)]
    done = CliRunner().invoke(main, [*arguments, "--address", f"http://127.0.0.1:{port}"])
    assert done.exit_code == 2 and "did not take the job" in done.output and "Traceback" not in done.output
    done = CliRunner().invoke(main, arguments, env={"RAY_API_SERVER_ADDRESS": None})
    assert done.exit_code == 2 and "--address" in done.output
