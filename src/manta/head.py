"""A Ray cluster of our own: how it starts, and a process that starts it while the driver checks what it was given.

A cluster takes four seconds to be there, most of which pass in waiting. The process is a driver to Ray, one without
work; it ends the cluster when its standard input does, so also when whoever started it is killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from manta import quiet

# How soon the cluster itself takes a silent node for lost: 5 checks in a row that fail at once (a dead process) or
# after the timeout (a cut cable). By default 3 s apart and 10 s long.
_NODE_CHECKS = {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 5}
# Idle processes that a node keeps, spares among them; Ray's default is its number of CPUs.
_IDLE = {"num_workers_soft_limit": 64}
SYSTEM = _NODE_CHECKS | _IDLE  # of a cluster that we start
TIMED_OUT = "timed out during startup"  # of the message of Ray's exception, which has no type of its own
_PATIENCE_S = 30.0  # with a cluster that is to end
# Processes that Ray starts before anybody asks belong to no job, and could not be forked as the others are.
_FORKED = {"prestart_worker_first_driver": False}


def start(python: str | None, **options: Any) -> None:
    """Start a cluster on this machine, and connect to it. Raises what `ray.init` does.

    `python` is what it has as Python for its processes, where that is not this one. Ray takes `sys.executable`, and
    asks for no other; its option `py_executable` comes too late: before it, each process imports Ray once in vain.
    """
    import ray

    options = {"log_to_driver": quiet.is_verbose(), "logging_level": level(), "include_dashboard": False, **options}
    system = SYSTEM | (_FORKED if python else {})
    before = sys.executable
    try:
        sys.executable = python or before
        ray.init("local", _system_config=system, **options)  # None would also take a cluster that was left here
    finally:
        sys.executable = before


def join(address: str, runtime_env: dict[str, Any] | None = None) -> None:
    """Connect to a cluster that is there. Raises what `ray.init` does."""
    import ray

    ray.init(address, runtime_env=runtime_env, log_to_driver=quiet.is_verbose(), logging_level=level())


def level() -> int:
    """What Ray's own loggers say."""
    return logging.INFO if quiet.is_verbose() else logging.ERROR


class Head:
    """A process that starts a cluster, or has started it."""

    def __init__(self, python: str | None):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(python)],
            env=dict(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if quiet.is_verbose() else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the driver
            text=True,
        )
        self._is_wanted = False

    def address(self) -> str | None:
        """host:port of the cluster, once it is there. None if it did not start: `start` says why.

        Raises what Ray does if it has waited in vain, which is not done twice.
        """
        assert self._process.stdout
        self._is_wanted = True
        said = self._process.stdout.readline().strip()
        if TIMED_OUT in said:
            raise Exception(said)
        return said or None

    def end(self) -> None:
        """Of the cluster too. One that nobody wanted is not waited for, and leaves nothing."""
        if self._is_wanted:
            with suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=_PATIENCE_S)
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it has started is in its group
            self._process.communicate()
        if self._is_wanted:
            return
        folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray")
        for session in folder.glob(f"session_*_{self._process.pid}"):
            shutil.rmtree(session, ignore_errors=True)
        if (latest := folder / "session_latest").is_symlink() and not latest.exists():
            latest.unlink()
        with suppress(OSError):  # it holds more, or was never made
            folder.rmdir()


@contextmanager
def running(python: str | None) -> Iterator[Head]:
    """A cluster that is begun now, and there until the end of the block; `python` as in `start`.

    Its connections need the token that Ray gives a cluster of this machine by default, which must be known before Ray
    is imported: https://docs.ray.io/en/latest/ray-security/token-auth.html
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    head = Head(python)
    try:
        yield head
    finally:
        head.end()


def _main() -> None:
    import ray

    try:
        start(json.loads(sys.argv[1]), log_to_driver=False)
    except Exception as error:
        if TIMED_OUT in str(error):
            print(repr(str(error)), flush=True)
        raise
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    _main()
