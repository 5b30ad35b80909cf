"""Processes as Ray asks for them, from a real fork server, and without one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from heaps import HAS_ONE_HEAP
from manta import fork_client, forkserver, heap, imports
from manta.fork_client import worker_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")]

WORKER = (
    HAS_ONE_HEAP
    + """
import gc, json, os, sys
torch, ray = sys.modules.get("torch"), sys.modules.get("ray")
told = {
    "parent": os.getppid(), "group": os.getpgrp(), "pid": os.getpid(), "folder": os.getcwd(), "said": sys.stdin.read(),
    "arguments": sys.argv, "first": sys.path[0], "main": sys.modules["__main__"].__file__,
    "modules": list(sys.modules), "collects": gc.isenabled(), "threads": torch and torch.get_num_threads(),
    "memory": {line.split()[0]: int(line.split()[1]) for line in list(open("/proc/self/smaps_rollup"))[1:]},
    "variables": dict(os.environ), "id": ray and ray.ObjectID.from_random().hex(),
    "files": [os.readlink(file) for each in range(99) if os.path.lexists(file := f"/proc/self/fd/{each}")],
    "one heap": has_one_heap(), "oom": open("/proc/self/oom_score_adj").read().strip(),
}
print(json.dumps(told), flush=True)
"""
)
SETUP = "print('not asked for')"  # in place of Ray's, which runs where the server is not to


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ray scripts")
    (made / "default_worker.py").write_text(WORKER)
    (made / "setup_worker.py").write_text(SETUP)
    return made


DRIVER = """
import os, sys
if sys.argv[1] == "late":
    import readline, torch  # the first sets variables that os.environ has not
from manta import forkserver
pipe = os.readlink(f"/proc/self/fd/{os.pipe()[0]}")
with forkserver.running(1, *sys.argv[2:]) as server:
    server.begin()
    print(server.python, pipe, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A driver with a server, what Ray is to start as Python, and a pipe that the driver had before it."""
    command = [sys.executable, "-c", DRIVER, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment(), text=True) as driver:
        assert driver.stdout
        yield driver, *driver.stdout.readline().split()
    assert driver.returncode in (0, -signal.SIGKILL)


@pytest.fixture(scope="module", params=["early", "late"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Forked from a driver that has imported nothing yet, and begun beside one that has."""
    with serving(request.param, "ray.train.torch") as started:
        yield started


@pytest.fixture
def python(server: tuple[subprocess.Popen[str], str, str]) -> str:
    return server[1]


def command_of(folder: Path, *arguments: str, **context: Any) -> list[str]:
    """As Ray's raylet writes it."""
    context = {"command_prefix": [], "env_vars": {}, "py_executable": "python", "java_jars": [], **context}
    worker = str(folder / "default_worker.py")
    given = f"--serialized-runtime-env-context={json.dumps(context)}"
    return [str(folder / "setup_worker.py"), worker, *arguments, given, "--language=PYTHON"]


def run(python: str, command: list[str], told: Callable[[], str], **how: Any) -> str:
    """What the process said, which goes on after the one that was started is done."""
    subprocess.run([python, *command], check=True, timeout=90, **how)
    end = time.monotonic() + 20
    while not (said := told()).endswith("\n") and time.monotonic() < end:
        time.sleep(0.02)
    return said


def environment() -> dict[str, str]:
    """Of this process, as it is for more than one test."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def environment_of_ray() -> dict[str, str]:
    return environment() | {"RAY_JOB_ID": "01000000"}


def asked(python: str, command: list[str], out: Path, said: str = "", **variables: str) -> Any:
    (out / "in").write_text(said)
    with (out / "in").open() as given, (out / "out").open("w") as file:
        env = {**environment_of_ray(), **variables}
        return run(python, command, (out / "out").read_text, stdin=given, stdout=file, cwd=out, env=env)


def test_a_process_is_what_python_would_have_made_it(server, folder, tmp_path):
    driver, python, pipe = server
    given = {**heap.variables(), "OMP_NUM_THREADS": "2", "RAY_TRAIN_X": "a=b"}
    command = command_of(folder, "--node-id=ü 1", env_vars=given)
    told = json.loads(asked(python, command, tmp_path, "line\n", RAY_RAYLET_PID="7"))
    worker = str(folder / "default_worker.py")
    assert told["arguments"] == [worker, "--node-id=ü 1"] and told["main"] == worker and told["first"] == str(folder)
    assert told["said"] == "line\n" and told["folder"] == str(tmp_path)
    assert told["variables"] == {**environment_of_ray(), **given, "RAY_RAYLET_PID": "7"}
    assert psutil.Process(told["parent"]).ppid() == driver.pid
    assert pipe not in told["files"] and told["collects"]
    assert {*imports.OF_WORKERS, "ray.train.torch"} <= set(told["modules"])
    assert told["memory"]["Pss:"] < 0.75 * told["memory"]["Rss:"], "it shares what was imported"
    assert told["one heap"] and told["threads"] == 2 and told["group"] == told["pid"] and told["oom"] == "1000"


def test_threads_are_those_of_a_worker_where_nothing_is_said(python, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert json.loads(asked(python, command_of(folder), tmp_path))["threads"] == 1


def test_many_at_once_are_processes_of_their_own(python, folder, tmp_path):
    places = [tmp_path / str(number) for number in range(12)]
    for place in places:
        place.mkdir()
    files = [(place / "out").open("w") for place in places]
    started = [
        subprocess.Popen(
            [python, *command_of(folder, str(n))], stdout=file, stdin=subprocess.DEVNULL, env=environment_of_ray()
        )
        for n, file in enumerate(files)
    ]
    assert [each.wait(60) for each in started] == [0] * 12
    told = [json.loads(run("true", [], (place / "out").read_text)) for place in places]
    assert [each["arguments"][1] for each in told] == [str(number) for number in range(12)]
    assert len({each["pid"] for each in told}) == len({each["id"] for each in told}) == 12
    assert all(each["id"] for each in told)
    for file in files:
        file.close()


@pytest.mark.parametrize(
    ("context", "variables"),
    [
        ({}, {"HF_HUB_OFFLINE": "0", "HF_HOME": "/elsewhere"}),  # read in an import, which is over
        ({}, {"RAY_JOB_ID": "02000000"}),
        ({"env_vars": {"LD_PRELOAD": ""}}, {}),
        ({"command_prefix": ["source activate &&"]}, {}),
        ({"override_worker_entrypoint": "/other.py"}, {}),
        ({"env_vars": {"PLACE": "${HOME}/x"}}, {}),  # which Ray expands
    ],
)
def test_what_is_not_alike_is_left_to_python(python, folder, tmp_path, context, variables):
    assert asked(python, command_of(folder, **context), tmp_path, **variables) == "not asked for\n"


def test_other_scripts_are_left_to_python(python, folder, tmp_path):
    (tmp_path / "agent.py").write_text("import sys; print(sys.executable, sys.argv[1:])")
    said = asked(python, [str(tmp_path / "agent.py"), "-x", "--listen-port=52365"], tmp_path)
    assert said == f"{sys.executable} ['-x', '--listen-port=0']\n"  # the port may be another cluster's
    assert worker_of([]) is None and worker_of(["-c", "pass"]) is None


def test_it_ends_as_a_process_does(python, tmp_path):
    (tmp_path / "default_worker.py").write_text("import atexit, sys; atexit.register(print, 'left'); sys.exit(3)")
    (tmp_path / "setup_worker.py").write_text(SETUP)
    assert asked(python, command_of(tmp_path), tmp_path) == "left\n"


@pytest.mark.parametrize("when", ["early", "late"])
def test_without_a_server_and_with_one_that_hangs_python_starts(folder, tmp_path, when):
    gone = fork_client.write(tmp_path / "gone", tmp_path / "no-socket")
    assert asked(str(gone), command_of(folder), tmp_path) == "not asked for\n"
    with serving(when) as (_, python, _):
        server = psutil.Process(json.loads(asked(python, command_of(folder), tmp_path))["parent"])
        server.send_signal(signal.SIGSTOP)
        patient = Path(python).read_text()
        Path(python).write_text(patient.replace("_PATIENCE_S = 60.0", "_PATIENCE_S = 0.5"))
        assert asked(python, command_of(folder), tmp_path) == "not asked for\n"
    assert not server.is_running() and not Path(python).parent.exists()


@pytest.mark.parametrize("when", ["early", "late"])
def test_no_fork_with_a_module_that_draws_one_of_rays_ids(folder, tmp_path, monkeypatch, when):
    """All forked processes would draw the next ones alike, and take each other's objects for their own."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "drawing.py").write_text("import ray; ray.ObjectID.from_random()")
    with serving(when, "drawing") as (_, python, _):
        assert asked(python, command_of(folder), tmp_path) == "not asked for\n"


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_driver_that_is_killed_leaves_no_server(when):
    with serving(when) as (driver, python, _):
        assert Path(python).exists()
        (server,) = psutil.Process(driver.pid).children()
        driver.kill()
        assert psutil.wait_procs([server], timeout=30)[1] == []
    assert not Path(python).parent.exists()


def test_no_fork_where_temporary_files_cannot_be_programs(tmp_path, monkeypatch):
    """As where /tmp is mounted noexec, and where the name of a socket would be too long."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.X_OK)
    with forkserver.running(1) as server:
        assert server is None
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 90)))
    Path(tempfile.gettempdir()).mkdir()
    with forkserver.running(1) as server:
        assert server is None


def test_no_fork_where_a_gpu_is(monkeypatch):
    monkeypatch.setattr(forkserver, "_GPUS", ("/dev/null",))
    with forkserver.running(1) as server:
        assert server is None
