"""What the driver asks of Ray."""

from __future__ import annotations

import json

import pytest

from manta import cluster
from manta.config import Config
from manta.data.prepare import Prepared
from manta.errors import UserError
from manta.lease import Lease
from manta.runs import Run
from manta.train import _place, _trainer


def test_without_a_gpu_one_cpu_worker_is_meant(ray_cluster):
    assert cluster.device(Config()) == "cpu"
    assert cluster.workers(Config(), "cpu") == (1, 1)
    assert cluster.resources_per_worker(Config(), "cpu") == {"CPU": 1.0}
    with pytest.raises(UserError, match="no GPU"):
        cluster.device(Config(device="cuda"))


def test_gpu_kernels_are_refused_on_cpu(ray_cluster):
    with pytest.raises(UserError, match="use_liger_kernel"):
        _place(Config(use_liger_kernel=True))
    assert _place(Config()).num_workers == 1


def test_room_is_counted_per_node(ray_cluster):
    cluster.check_fits(2, {"CPU": 1})
    with pytest.raises(UserError, match="room for 2"):
        cluster.check_fits(3, {"CPU": 1})
    with pytest.raises(UserError, match="room for 0"):
        cluster.check_fits(1, {"CPU": 4, "GPU": 1})


def test_room_is_counted_as_workers_are_placed(ray_cluster):
    cluster.check_fits(1, {"CPU": 1}, "STRICT_SPREAD")
    with pytest.raises(UserError, match="one on each node asked, but the cluster has room for 1"):
        cluster.check_fits(2, {"CPU": 1}, "STRICT_SPREAD")
    cluster.check_fits(2, {"CPU": 1}, "STRICT_PACK")
    with pytest.raises(UserError, match="all on one node asked, but the cluster has room for 2"):
        cluster.check_fits(3, {"CPU": 1}, "STRICT_PACK")


def test_workers_get_the_drivers_networks_and_no_secret(tmp_path, monkeypatch):
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "eth7")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run, prepared = Run(tmp_path / "run"), Prepared(tmp_path)
    trainer = _trainer(Config(device="cpu", num_workers=2), run, prepared, Lease(run), "mailbox")
    environment = trainer.run_config.worker_runtime_env["env_vars"]
    assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "hf_secret" not in environment.values()


def test_the_controllers_intervals_are_not_set_twice(monkeypatch):
    """Ray refuses a driver of a job that sets a variable of the job's again."""
    for name, value in cluster.TIMEOUTS.items():
        monkeypatch.setenv(name, value)
    assert cluster._for_the_controller() == cluster.TIMEOUTS
    given = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": given}}))
    assert cluster._for_the_controller().keys() == cluster.TIMEOUTS.keys() - given.keys()


def test_workers_get_the_allocators_setting(tmp_path):
    """And on CPU they see no GPU, whatever the node has."""
    run, prepared = Run(tmp_path / "run"), Prepared(tmp_path)
    on_gpus = _trainer(Config(device="cuda", num_workers=8), run, prepared, Lease(run), "mailbox")
    environment = on_gpus.run_config.worker_runtime_env["env_vars"]
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert on_gpus.scaling_config.use_gpu and on_gpus.scaling_config.num_workers == 8
    assert on_gpus.backend_config.backend == "nccl" and on_gpus.backend_config.timeout_s == 7200
    on_cpu = _trainer(Config(device="cpu", num_workers=2), run, prepared, Lease(run), "mailbox")
    assert on_cpu.run_config.worker_runtime_env["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""
    assert on_cpu.backend_config.backend == "gloo"


def test_a_cluster_that_is_not_there_is_a_message(tmp_path):
    import subprocess
    import sys

    program = (
        "from manta import Config; from manta.cluster import connected\n"
        "with connected(Config(ray_address='127.0.0.1:9')): pass"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "No Ray cluster at 127.0.0.1:9" in done.stderr and "ray start --head" in done.stderr
