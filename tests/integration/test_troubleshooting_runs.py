"""Those errors of docs/troubleshooting.md that only Ray and its workers have, produced for real."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from faults.disk import small_disk
from faults.job import kill_marked, marks
from manta.cli import main
from running import small_config, write_rows
from tiny import tiny_model
from troubleshooting import check

pytestmark = pytest.mark.slow

CODE = '''
import os, signal, time
from pathlib import Path
import torch
import torch.distributed as dist
from transformers import Qwen3ForCausalLM


class WrongForCausalLM(Qwen3ForCausalLM):
    """In its first step, rank 1 does what the file `wrong` says."""

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled() and dist.get_rank() == 1:
            what = Path(FOLDER, "wrong").read_text()
            if what == "memory":
                torch.empty(1 << 50)
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            while what == "stuck":
                time.sleep(1)
        return super().forward(*args, **kwargs)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    base = Path(tiny_model(folder / "base"))
    (base / "modeling_wrong.py").write_text(CODE.replace("FOLDER", repr(str(base))))
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_wrong.WrongForCausalLM"}}
    (base / "config.json").write_text(json.dumps(config))
    return folder


def trained(folder: Path, name: str, **settings: object) -> tuple[str, int]:
    """What `manta train` prints at its end, and its exit code, on two workers of the Ray that is up."""
    config = small_config(
        folder,
        run_name=name,
        trust_remote_code=True,
        max_steps=2,
        eval_steps=0,
        per_device_train_batch_size=1,
        max_failures=0,
        spare_workers=False,
        step_copies="off",
        data={"train_split_ratio": 1.0},
        **settings,
    )
    recipe = folder / f"{name}.yaml"
    recipe.write_text(config.dump())
    done = CliRunner().invoke(main, ["train", "--config", str(recipe)])
    return done.stderr, done.exit_code


@pytest.mark.parametrize(
    ("title", "what", "settings"),
    [
        ("A worker's memory is full", "memory", {}),
        ("A worker's process was killed", "killed", {}),
        ("Workers wait for one another in vain", "stuck", {"torch_timeout_s": 20}),
    ],
)
def test_a_worker_that(ray_cluster, folder, title, what, settings):
    (folder / "base" / "wrong").write_text(what)
    check(title, *trained(folder, what, **settings))


def test_more_workers_than_there_is_room_for(ray_cluster, folder):
    check("There is no room for so many workers", *trained(folder, "many", num_workers=9))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_disk_that_is_full_for_the_tasks_of_ray(ray_cluster, tmp_path):
    """So many rows are prepared by tasks, in other processes."""
    write_rows(tmp_path / "rows.jsonl", 9000)
    with small_disk(tmp_path / "disk", "1m") as disk:
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize)
        settings = {"data": {"dataset_name": str(tmp_path / "rows.jsonl")}, "data_dir": str(disk / "prepared")}
        config = small_config(tmp_path, **settings)
        (tmp_path / "full.yaml").write_text(config.dump())
        done = CliRunner().invoke(main, ["prepare", "--config", str(tmp_path / "full.yaml")])
    check("The disk is full", done.stderr, done.exit_code)


# --- Another Ray than the session's: processes of their own.

NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}  # else each has a secret of its own
OTHER = """
import json, sys, time
import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

context = ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
about = json.loads(_internal_kv_get(b"CLUSTER_METADATA", namespace="cluster"))
_internal_kv_put(b"CLUSTER_METADATA", json.dumps(about | {"ray_version": "2.9.0"}), namespace="cluster")
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def command(folder: Path, **more: object) -> list[str]:
    small_config(folder)  # the rows
    flags = {
        "hf_model_id": folder / "plain",
        "hfdc_dataset_name": folder / "rows.jsonl",
        "hfdc_input_template": "{question}\\n",
        "hfdc_output_template": "{answer}",
        "max_seq_length": 96,
        "results_dir": folder / "elsewhere",
        "data_dir": folder / "prepared",
        **more,
    }
    tiny_model(folder / "plain")
    return [sys.executable, "-m", "manta", "train", *(f"--{name}={value}" for name, value in flags.items())]


def elsewhere(folder: Path, address: str) -> tuple[str, int]:
    environment, line = {**os.environ, **NO_TOKEN}, command(folder, ray_address=address)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=150)
    return done.stderr, done.returncode


def test_ray_that_does_not_start(folder):
    """Its raylet is stopped as soon as it is there, and would be at a second try."""
    environment = {**os.environ, **NO_TOKEN, **marks("slow")}
    with subprocess.Popen(command(folder), env=environment, stderr=subprocess.PIPE, text=True) as driver:
        try:
            stopped = set()
            while driver.poll() is None:
                with contextlib.suppress(psutil.Error):
                    for each in psutil.Process(driver.pid).children(recursive=True):
                        if each.name() == "raylet" and each not in stopped:
                            each.suspend()
                            stopped.add(each)
                time.sleep(0.05)
            assert len(stopped) == 1 and driver.stderr
            check("Ray does not start", driver.stderr.read(), driver.returncode)
        finally:
            kill_marked("slow")


def test_there_is_no_ray(folder):
    check("No Ray is at the address", *elsewhere(folder, "127.0.0.1:9"))


def test_ray_of_another_version(folder):
    """A real cluster whose own record of its version says 2.9.0, which the real client compares with itself."""
    with tempfile.TemporaryDirectory(prefix="mv-", dir="/tmp") as temporary:
        environment = {**os.environ, "RAY_TMPDIR": temporary, **NO_TOKEN}
        environment.pop("RAY_ADDRESS", None)
        cluster = subprocess.Popen(
            [sys.executable, "-c", OTHER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert cluster.stdin and cluster.stdout
        try:
            check("Ray is of another version there", *elsewhere(folder, cluster.stdout.readline().strip()))
        finally:
            cluster.stdin.close()
            cluster.wait(60)
