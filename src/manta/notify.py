"""Telling somebody that a run ended, failed or restarted: a POST to a URL, or a command. It never holds up training.

A secret, such as the URL of a webhook, is given by reference: `env:NAME` is what the variable NAME of the driver holds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Self

from manta.errors import TrainingError, UserError
from manta.references import is_url, resolve
from manta.status import Status

TIMEOUT_S = 10.0  # of one notification, and of the wait for the last one when the run has ended


class Notifier:
    """Sends what happens to a run, one after another, from a thread of its own; without a `target`, nothing.

    The run's `status` and `path` go with each event; `say` tells the user of the first notification that fails. Raises
    UserError where the target is a reference to nothing, or no such command.
    """

    def __init__(self, target: str | None, status: Status, path: str, say: Callable[[str], None]):
        self.target = _checked(target) if target else None
        self.status, self.path, self.say = status, path, say
        self._failure = {"cause": "unknown", "text": "the workers ended"}
        self._attempts = 0
        self._told = False
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="manta-notify", daemon=True)

    def __enter__(self) -> Self:
        if self.target:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is under way and for the end's own, which hang at most."""
        self._queue.put(None)
        if self.target:
            self._thread.join(2 * TIMEOUT_S + 1)

    def take(self, message: dict[str, Any]) -> None:
        """A message of the mailbox: workers that ended are told of once others go on."""
        if message["kind"] == "failure":
            self._failure = message
        elif message["kind"] == "attempt":
            self._attempts += 1
            if self._attempts > 1:
                workers = f"{message['world_size']} worker{'s' * (message['world_size'] > 1)}"
                text = f"restarted from step {message['step']} on {workers}: {self._failure['text']}"
                self._send("restarted", text, cause=self._failure["cause"])

    def ended(self, result: dict[str, Any]) -> None:
        """Finished, or stopped before its end."""
        text = f"{result['status']} after step {result['steps']} of {result['max_steps']}"
        if result["best_metric"] is not None:
            text += f", best {result['metric']} {result['best_metric']:.4f}"
        if result["asked_to_stop"]:
            text += "; it was asked to stop, and the same command goes on"
        self._send(result["status"], text, result=result)

    def failed(self, error: BaseException) -> None:
        text = str(error) if isinstance(error, UserError | TrainingError) else f"{type(error).__name__}: {error}"
        self._send("failed", text)

    def _send(self, event: str, text: str, **more: Any) -> None:
        if not self.target:
            return
        if event != "restarted":  # the end is worth more than what may still wait behind a slow one
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
        about = {"event": event, "text": f"Manta, {self.status.run}: {text}", "host": socket.gethostname()}
        self._queue.put(_plain({**about, **self.status.as_dict(), "path": self.path, **more}))

    def _run(self) -> None:
        while payload := self._queue.get():
            problem = deliver(self.target or "", payload)
            if problem and not self._told:
                self._told = True
                self.say(f"--notify does not work: {problem}. This is said once; training goes on.")


def _checked(target: str) -> str:
    """The URL or command that `target` stands for."""
    found = resolve(target)
    if is_url(found):
        return found
    try:
        program = shlex.split(found)[0]
    except (ValueError, IndexError):
        raise UserError(f"--notify {target} is neither a URL nor a command line. Mend it, or leave it out.") from None
    if shutil.which(program) is None:
        name = program if found == target else target  # what a variable holds is not said
        raise UserError(f"--notify {name}: there is no such command. Give its path, or a URL with http(s)://.")
    return found


def deliver(target: str, payload: dict[str, Any]) -> str | None:
    """POST `payload` to a URL, or give it to a command; returns what went wrong, without the target, or None."""
    try:
        return (_post if is_url(target) else _call)(target, payload)
    except Exception as error:  # of a client, or a system without processes left: no reason to end a run
        return type(error).__name__


def _post(url: str, payload: dict[str, Any]) -> str | None:
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs URLs
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    with httpx.stream("POST", url, json=payload, timeout=TIMEOUT_S) as response:
        return None if response.is_success else f"the server answers {response.status_code}"


def _call(command: str, payload: dict[str, Any]) -> str | None:
    """Run `command`, without a shell, with the JSON on its stdin and the plain values as MANTA_… variables."""
    environment = dict(os.environ)
    for name, value in payload.items():
        if isinstance(value, str | int | float):
            environment[f"MANTA_{name.upper()}"] = str(value)
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        shlex.split(command), stdin=subprocess.PIPE, env=environment, start_new_session=True, **quiet
    )
    try:
        process.communicate(json.dumps(payload, ensure_ascii=False).encode(), timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        process.wait()
        return f"the command took longer than {TIMEOUT_S:.0f} s and was ended"
    return f"the command ends with {process.returncode}" if process.returncode else None


def _plain(value: Any) -> Any:
    """What JSON can say: NaN and infinity are null."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
