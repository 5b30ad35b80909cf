"""A cluster that is started beside a driver: joined, for nothing, and left by a driver that is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from manta import head

pytestmark = pytest.mark.slow

JOINED = """
from manta import head
with head.running(None) as cluster:
    head.join(cluster.address())
    import ray
    print(len(ray.nodes()), ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
    ray.shutdown()
"""
KILLED = """
import time
from manta import head
with head.running(None) as cluster:
    print(cluster.address(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ray's files; a short name, since sockets are among them."""
    made = Path(tempfile.mkdtemp(prefix="mh"))
    monkeypatch.setenv("RAY_TMPDIR", str(made))
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "token"))  # which `running` sets
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def family(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def all_end(group: int) -> bool:
    end = time.monotonic() + 30
    while (left := family(group)) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


def driver(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_a_driver_joins_it_and_nothing_is_left_running(folder):
    with driver(JOINED) as process:
        (leader,) = wait_for_children(process.pid)
        assert process.stdout
        assert process.stdout.read() == "1 42\n"
    assert process.returncode == 0
    assert family(leader.pid) == []


@pytest.mark.parametrize("seconds", [0.0, 1.5, 3.0])
def test_one_that_nobody_wanted_leaves_nothing(folder, seconds):
    """Neither its processes nor a file, however far it has come."""
    with head.running(None) as cluster:
        group = cluster._process.pid
        time.sleep(seconds)
        assert family(group)
    assert all_end(group)
    assert list(folder.iterdir()) == []


def test_it_ends_with_a_driver_that_is_killed(folder):
    with driver(KILLED) as process:
        assert process.stdout and ":" in process.stdout.readline()
        (leader,) = psutil.Process(process.pid).children()
        assert len(family(leader.pid)) > 3
        process.kill()
    assert all_end(leader.pid)


def wait_for_children(pid: int) -> list[psutil.Process]:
    end = time.monotonic() + 30
    while not (found := psutil.Process(pid).children()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
