"""What Ray starts in place of Python: it has `forkserver` fork a worker process, or else starts Python after all.

Run without site-packages, and it imports next to nothing, so as to take next to no time.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

GREETING = b"go on"
MOST_BYTES = 1 << 20
_PATIENCE_S = 60.0  # with the imports of a server that has just begun
_SETUP, _WORKER = "setup_worker.py", "default_worker.py"  # Ray's scripts, of which the first starts the second
# Ray's agent of a node tries this one for 3 s, and the node waits for it, where another cluster of this machine has it.
_PORT_FIXED, _PORT_FREE = "--listen-port=52365", "--listen-port=0"
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="


def write(path: Path, server: Path) -> Path:
    """A copy of this module at `path` that can be executed, and asks the server at the socket `server`."""
    code = Path(__file__).read_text(encoding="utf-8")
    path.write_text(f"#!{sys.executable} -SE\n{code}\n\nmain({str(server)!r}, {sys.executable!r})\n", encoding="utf-8")
    path.chmod(0o700)
    return path


def main(server: str, python: str) -> None:
    """Have the command line of this process run: by the server if it is Ray's for a worker, else by `python`."""
    arguments = [_PORT_FREE if each == _PORT_FIXED else each for each in sys.argv[1:]]
    worker = worker_of(arguments)
    if worker is None or not ask(server, worker[0], {**os.environ, **worker[1]}):
        os.execv(python, [python, *arguments])


def worker_of(arguments: list[str]) -> tuple[list[str], dict[str, str]] | None:
    """The arguments and the variables of the worker that Ray asks for, if these are all there is to it.

    Ray's `setup_worker.py` does the same, after it has imported Ray: ray/_private/runtime_env/context.py
    """
    script = Path(arguments[0]).name if arguments else None
    if script == _WORKER:  # without an environment of its own
        return arguments, {}
    if script != _SETUP:
        return None
    rest = [each for each in arguments[1:] if not each.startswith((_CONTEXT, _LANGUAGE))]
    given = [each.removeprefix(_CONTEXT) for each in arguments if each.startswith(_CONTEXT)]
    context = json.loads(given[-1] or "{}") if given else {}
    variables = context.pop("env_vars", {})
    context.pop("py_executable", None)  # that of Ray's agent, for lack of another
    plain = not any(context.values()) and not any("$" in value for value in variables.values())
    return (rest, variables) if plain and rest and Path(rest[0]).name == _WORKER else None


def ask(server: str, arguments: list[str], environment: dict[str, str]) -> bool:
    """Whether the server has forked a process of these, with the folder and the files of this one."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    said = "\0".join([str(Path.cwd()), str(len(arguments)), *arguments, *variables])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_PATIENCE_S)
        try:
            connection.connect(server)
            if not connection.recv(len(GREETING)):
                return False
            socket.send_fds(connection, [said.encode(errors="surrogateescape")], [0, 1, 2])
            return bool(connection.recv(64))
        except OSError:
            return False
