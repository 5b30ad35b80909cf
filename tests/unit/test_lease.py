import json
import os
import socket
import subprocess
import sys
import time

import pytest

from manta import lease
from manta.errors import UserError
from manta.lease import EXPIRES_S, Lease
from manta.runs import Run

TAKE = "import sys, time; from manta.lease import Lease; from manta.runs import Run; from pathlib import Path\n"
HOLD = TAKE + "with Lease(Run(Path(sys.argv[1]))) as held: print(held.token, flush=True); time.sleep(60)"


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "a-run")


@pytest.fixture
def holder(run):
    """Another process that has the lease, and its token."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


def lease_of_another_host(run, age=0.0):
    run.path.mkdir(parents=True, exist_ok=True)
    path = run.path / lease.NAME
    path.write_text(json.dumps({"token": "theirs", "host": "elsewhere", "pid": 1, "born": "1", "since": "now"}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_lease_is_there_while_it_is_held(run):
    with Lease(run) as held:
        about = lease.holder_of(run.path)
        assert about["token"] == held.token and about["pid"] == os.getpid() and about["host"] == socket.gethostname()
        assert lease.is_held(run.path) and lease.loss(run.path, held.token) is None
    assert not lease.is_held(run.path) and list(run.path.iterdir()) == []


def test_a_second_driver_is_refused_and_told_who_has_the_run(run, holder):
    process, token = holder
    for attempt in (lambda: lease.refuse_if_held(run.path), Lease(run).__enter__):
        with pytest.raises(UserError, match=rf"Another driver .*process {process.pid} on .*--run_name"):
            attempt()
    assert lease.holder_of(run.path)["token"] == token and [path.name for path in run.path.iterdir()] == [lease.NAME]


def test_the_lease_of_a_killed_driver_is_free_at_once(run, holder):
    process, token = holder
    process.kill()
    process.wait()
    lease.refuse_if_held(run.path)
    with Lease(run) as held:
        assert held.token != token and lease.holder_of(run.path)["token"] == held.token
        assert "so this driver's workers write no more" in lease.loss(run.path, token)
        assert f"process {os.getpid()}" in lease.loss(run.path, token)


def test_another_process_with_the_same_number_is_not_the_holder(run):
    with Lease(run):
        path = run.path / lease.NAME
        path.write_text(json.dumps({**lease.holder_of(run.path), "born": "12"}))
        assert not lease.is_held(run.path)


def test_a_lease_of_another_host_is_free_once_it_is_not_renewed(run):
    lease_of_another_host(run)
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        lease.refuse_if_held(run.path)
    lease_of_another_host(run, age=EXPIRES_S + 1)
    with Lease(run) as held:
        assert lease.holder_of(run.path)["token"] == held.token


def test_a_holder_renews_its_lease(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with Lease(run):
        path = run.path / lease.NAME
        os.utime(path, (time.time() - 1000,) * 2)
        limit = time.monotonic() + 10
        while time.time() - path.stat().st_mtime > 100:
            assert time.monotonic() < limit
            time.sleep(0.02)


def test_who_lost_a_lease_neither_renews_nor_removes_that_of_another(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    with Lease(run):
        lease_of_another_host(run, age=500)
        time.sleep(0.2)
        assert time.time() - (run.path / lease.NAME).stat().st_mtime > 400
    assert lease.holder_of(run.path)["token"] == "theirs"


def test_of_many_drivers_that_find_a_dead_lease_one_gets_the_run(run):
    lease_of_another_host(run, age=EXPIRES_S + 1)
    code = HOLD.replace("time.sleep(60)", "time.sleep(5)")
    command = [sys.executable, "-c", code, str(run.path)]
    drivers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    outputs = [driver.communicate(timeout=60) for driver in drivers]
    assert sum(bool(out.strip()) for out, _ in outputs) == 1
    assert sum("Another driver is training" in err for _, err in outputs) == 5


def test_without_a_token_there_is_nothing_to_lose(run):
    assert lease.loss(run.path, None) is None
    assert "nobody has it now" in lease.loss(run.path, "mine")
