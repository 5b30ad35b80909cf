"""A process that has imported what training workers import, and forks Ray's processes: in 0.1 s each, not 4.

It serves one cluster, of our own and on this machine; elsewhere, and wherever it does not answer, processes start in
the usual way. Ray is given `fork_client` for its Python, which has the server fork a process with the arguments,
environment and files that it got, and is done.

Ray reads the variables that it gives each process once, in its import. So it is imported for the first process, under
that one's variables, and whoever has others is not forked. On fork servers in general:
https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self
from unittest.mock import patch

from manta import fork_client, heap, imports, quiet

_GPUS = ("/dev/nvidiactl", "/dev/kfd")  # whose drivers do not survive a fork, once a library has asked for devices
_LONGEST = 100  # of the path of a socket, and of one after #!, that every Linux takes
_PATIENCE_S = 5.0
# Variables in which processes may differ: what is read when it is used, not in an import.
_MAY_DIFFER = (
    "RAY_RAYLET_PID",
    "RAY_TRAIN_",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC",
    "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR",
    "CUDA_VISIBLE_DEVICES",
    heap.ARENAS,  # these two are read when a process begins, as the server's were
    heap.TUNABLES,
    "OMP_NUM_THREADS",
    "SPT_NOENV",
    "TOKENIZERS_PARALLELISM",
    "TORCHINDUCTOR_CACHE_DIR",
)
_NO_JOB = "ffffffff"
_RAY = ("RAY_", "__RAY_")  # of which a process has more than the server, which Ray has not started


class Server:
    """A fork server at a socket that is there at once. Its processes compute with `threads` unless OMP_NUM_THREADS says
    more, and have `modules` too, which import Ray.

    A process that is at its beginning makes the imports itself and is forked for the server: they are made once, and
    shared. One that has imported more already may have threads, and the server is begun beside it.
    """

    def __init__(self, folder: Path, threads: int, modules: Collection[str]):
        self.python, self._socket = folder / "python", folder / "socket"
        self._threads, self._modules = threads, modules
        self._forked = 0  # a process of one kind or the other
        self._started: subprocess.Popen[bytes] | None = None
        self._listening = self._alive = self._ours = 0

    def is_possible(self) -> bool:
        fits = max(len(sys.executable), len(str(self._socket))) <= _LONGEST and " " not in sys.executable
        if sys.platform != "linux" or any(map(os.path.exists, _GPUS)) or not fits:
            return False
        return os.access(fork_client.write(self.python, self._socket), os.X_OK)

    def __enter__(self) -> Self:
        self._alive, self._ours = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self._socket))
            listener.listen(64)
            self._listening = listener.detach()
        self._is_early = not {"ray", "torch"} & sys.modules.keys()
        if not self._is_early:
            self.begin()
        return self

    def begin(self) -> None:
        """Make the imports and start the server, if that has not happened yet."""
        if self._forked or self._started:
            return
        if self._is_early and threading.active_count() == 1 and "ray" not in sys.modules:
            heap.unite()
            imports.ahead()
            _flush()
            self._forked = os.fork() or self._be_forked()
        else:
            numbers = [str(each) for each in (self._listening, self._alive, self._threads)]
            self._started = subprocess.Popen(
                [sys.executable, "-m", __name__, *numbers, *self._modules],
                # Without what libraries have put beside it, as readline does, and Ray leaves out.
                env={**os.environ, **heap.variables()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if quiet.is_verbose() else subprocess.DEVNULL,
                pass_fds=[self._listening, self._alive],
                start_new_session=True,  # Ctrl-C is for the driver
            )

    def _be_forked(self) -> NoReturn:
        """As `begin` has Python start the server. What this process was to do at its end is not for those forked."""
        atexit._clear()
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(2 if quiet.is_verbose() else 3):
            os.dup2(nothing, number)
        for number in {int(file.name) for file in Path("/proc/self/fd").iterdir()}:
            if number > 2 and number not in (self._listening, self._alive):
                with contextlib.suppress(OSError):  # that of /proc itself
                    os.close(number)  # a pipe may wait at its other end for the driver to close it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code: Any = 1
        try:
            _run(self._listening, self._alive, self._threads, self._modules)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            _flush()
            os._exit(code)

    def __exit__(self, *error: object) -> None:
        for number in (self._listening, self._alive, self._ours):
            os.close(number)
        if self._forked:
            os.kill(self._forked, signal.SIGKILL)
            os.waitpid(self._forked, 0)
        elif self._started:
            self._started.kill()
            self._started.wait()


@contextlib.contextmanager
def running(threads: int, *modules: str) -> Iterator[Server | None]:
    """A fork server for as long as the block, see there. `Server.python` is what Ray is to start as Python.

    None where that could not be: on other systems than Linux, with GPUs, and where folders for temporary files have
    long names or may hold no programs.
    """
    with tempfile.TemporaryDirectory(prefix="manta-fork-", ignore_cleanup_errors=True) as name:  # closed to others
        server = Server(Path(name), threads, modules)
        if not server.is_possible():
            yield None
            return
        with server:
            yield server


@dataclass(frozen=True)
class Asked:
    """A process to be: its folder, script and arguments, environment, and standard files."""

    folder: str
    arguments: list[str]
    environment: dict[str, str]
    files: list[int]

    @property
    def has_job(self) -> bool:
        """False of processes that Ray has ready for whatever comes."""
        return self.environment.get("RAY_JOB_ID", _NO_JOB) != _NO_JOB


def serve(listening: int, alive: int, threads: int, modules: Collection[str]) -> Asked | None:
    """Fork whenever asked, until the other end of the pipe `alive` is gone; returns in each forked process, with what
    it is to be, and at last in the server, with None."""
    ours, first = dict(os.environ), None
    with socket.socket(fileno=listening) as listener, selectors.DefaultSelector() as events:
        imports.ahead()
        importlib.import_module("torch").set_num_threads(threads)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that have ended leave nothing
        events.register(listener, selectors.EVENT_READ)
        events.register(alive, selectors.EVENT_READ)
        while all(key.fd != alive for key, _ in events.select()):
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # of a client that has gone
                connection.settimeout(_PATIENCE_S)
                asked = _receive(connection)
                if first is None and _alike(ours, asked.environment, _RAY) and asked.has_job:
                    first = asked.environment
                    _import_with_ray(modules, first)
                process = os.fork() if first and _alike(first, asked.environment) else None
                if process == 0:
                    return asked
                for file in asked.files:
                    os.close(file)
                if process:
                    connection.send(str(process).encode())
        shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)  # which a killed driver leaves
    return None


def _receive(connection: socket.socket) -> Asked:
    """Raises OSError where the client has gone: before it is greeted it may, after that it waits for an answer."""
    connection.send(fork_client.GREETING)
    said, files, _, _ = socket.recv_fds(connection, fork_client.MOST_BYTES, 3)
    if not said:
        raise ConnectionResetError
    folder, count, *rest = said.decode(errors="surrogateescape").split("\0")
    variables = [variable.split("=", 1) for variable in rest[int(count) :]]
    return Asked(folder, rest[: int(count)], dict(variables), files)


def _alike(one: Mapping[str, str], other: Mapping[str, str], but: Collection[str] = ()) -> bool:
    names = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    return all(name.startswith((*_MAY_DIFFER, *but)) for name in names)


def _import_with_ray(modules: Collection[str], environment: dict[str, str]) -> None:
    """Import Ray, and what needs it, under the variables of its processes. Raises RuntimeError if forks would be alike.

    Nothing may draw an ID on the way: Ray's generator has its seed from then on, and every fork would draw the same.
    What draws in an import is the decorator of classes in Ray's actor.py, for the ID of the class.
    """
    os.environ.update(environment)
    with imports.quickly():
        import ray.actor

        kind = ray.actor.ActorClassID
        drawn = SimpleNamespace(from_random=lambda: kind(os.urandom(kind.size())))
        with patch.object(ray.actor, "ActorClassID", drawn):
            for name in modules:
                importlib.import_module(name)
    if _drawn_by_a_fork() == _drawn_by_a_fork():
        raise RuntimeError("forked processes would draw the same IDs: this Ray draws some while it is imported")


def _drawn_by_a_fork() -> bytes:
    import ray

    there, here = os.pipe()
    if os.fork() == 0:
        os.write(here, ray.ObjectID.from_random().binary())
        os._exit(0)
    os.close(here)
    with os.fdopen(there, "rb") as file:
        return file.read()


def become(asked: Asked) -> None:
    """In a forked process: run the script as Python would have."""
    import numpy as np
    import torch

    os.setpgid(0, 0)  # Ray starts each process as a group, and ends it as one
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # as Ray does: workers go before the cluster does
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(asked.files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked.environment)
    os.chdir(asked.folder)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    np.random.seed()  # else all forked processes would draw the same
    sys.argv = asked.arguments
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _flush() -> None:
    """Write what was printed, which is otherwise written at the end of a process, and by each that was forked."""
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
            file.flush()


def _run(listening: int, alive: int, threads: int, modules: Collection[str]) -> None:
    if forked := serve(listening, alive, threads, modules):
        become(forked)


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
