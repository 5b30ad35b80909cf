"""What runs on the hosts of a job: Ray and the driver on the leading one, Ray on the others, until the driver ends.

Only this process hears SIGTERM. It asks the driver, which saves after the current step and leaves with 75, and keeps
Ray on every host meanwhile.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, NamedTuple

from manta.cluster import TIMEOUTS
from manta.errors import UserError
from manta.head import SYSTEM
from manta.launch import rendezvous
from manta.launch.rendezvous import PORT, Hosts

SAVE_S = 110  # SageMaker sends SIGKILL 120 s after SIGTERM
ASKED_TO_STOP = 75
GONE_S = 10.0  # a leading host that does not answer for so long is gone
_LOOK_S = 0.5
_COUNT_S = 5.0
_END_S = 15.0
_LINES = 40


class Outcome(NamedTuple):
    """Exit code, and why it is not 0."""

    code: int
    failure: str = ""


class Stop:
    """That this job was asked to stop, by SIGTERM or by a file, and when."""

    def __init__(self) -> None:
        self.since: float | None = None
        signal.signal(signal.SIGTERM, self._heard)

    def _heard(self, number: int, frame: object) -> None:
        self.since = self.since or time.monotonic()

    def wanted(self) -> bool:
        file = rendezvous.stop_file()
        if self.since is None and file and Path(file).exists():
            self.since = time.monotonic()
        return self.since is not None

    def over(self) -> bool:
        """Whether there is no time left."""
        return self.since is not None and time.monotonic() - self.since > SAVE_S


def lead(hosts: Hosts, driver: Callable[[str], list[str]], stop: Stop, elastic: bool, hidden: Iterable[str]) -> Outcome:
    """Start Ray's head, wait for the others, run `driver(address)`. Raises UserError if a host does not come.

    `elastic`: the driver goes on without a lost host; otherwise one that stays away ends the job. `hidden`: values that
    no message may hold.
    """
    here = rendezvous.address_of(hosts.me, hosts.timeout_s, stop.wanted)
    ray = _start_ray(here, "--head", "--port", str(PORT), "--include-dashboard", "false")
    try:
        if not _gather(hosts, here, ray, stop):
            return Outcome(ASKED_TO_STOP, "")
        with _Driver(driver(f"{here}:{PORT}"), list(hidden)) as running:
            return _watch(hosts, here, ray, running, stop, elastic)
    finally:
        _end(ray)


def follow(hosts: Hosts, stop: Stop) -> Outcome:
    """Join the leading host's Ray and stay until that is gone, which is no failure of this host. Raises UserError."""
    here = rendezvous.address_of(hosts.me, hosts.timeout_s, stop.wanted)
    leader = rendezvous.address_of(hosts.leader, hosts.timeout_s, stop.wanted)
    limit = time.monotonic() + hosts.timeout_s
    while not rendezvous.is_listening(leader):
        if stop.wanted():
            return Outcome(0)
        if time.monotonic() > limit:
            raise UserError(
                f"{hosts.leader} ({leader}) has no Ray on port {PORT} after {hosts.timeout_s:g} s. Its own log "
                "says why; if it has one, check that the hosts reach each other (security group, network policy)."
            )
        time.sleep(_LOOK_S)
    ray = _start_ray(here, "--address", f"{leader}:{PORT}")
    try:
        seen = time.monotonic()
        while time.monotonic() - seen < GONE_S and not stop.over():
            if rendezvous.is_listening(leader):
                seen = time.monotonic()
                if ray.poll() is not None:
                    time.sleep(GONE_S)  # it may know sooner than we that the other is leaving
                    if rendezvous.is_listening(leader):
                        return Outcome(1, f"Ray ended on {hosts.me} while {hosts.leader} goes on.")
            elif ray.poll() is not None:
                break
            time.sleep(2 * _LOOK_S)
        return Outcome(0)
    finally:
        _end(ray)


def write_failure(path: Path, text: str) -> None:
    """The first reason only, of at most 1024 characters, which is what SageMaker shows."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.strip()[:1024], encoding="utf-8")


def say(text: str) -> None:
    print(f"manta: {text}", file=sys.stderr, flush=True)


def _start_ray(here: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", here, *arguments]
    if "--head" in arguments:
        command += ["--system-config", json.dumps(SYSTEM)]
    more = os.environ.get("MANTA_RAY_START", "").split()
    # Ray is ended when nothing of it is needed any more: without the 30 s in which it would drain the node.
    ours = {**TIMEOUTS, "RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    # Its own session: a terminal's Ctrl-C reaches the driver first.
    return subprocess.Popen(
        [*command, *more],
        env=ours | os.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def _gather(hosts: Hosts, here: str, ray: subprocess.Popen[bytes], stop: Stop) -> bool:
    """Wait until every host is a live node of Ray; False if the job was asked to stop meanwhile."""
    limit, missing = time.monotonic() + hosts.timeout_s, list(hosts.names)
    while missing:
        if stop.wanted():
            return False
        if ray.poll() is not None:
            raise UserError(f"Ray does not start on {hosts.me} (exit code {ray.returncode}); its messages are above.")
        if time.monotonic() > limit:
            raise UserError(
                f"{len(hosts.names) - len(missing)} of {len(hosts.names)} hosts have joined Ray within "
                f"{hosts.timeout_s:g} s; {', '.join(missing)} did not come. Look at their logs, and whether "
                "hosts reach each other (security group, network policy)."
            )
        time.sleep(_LOOK_S)
        missing = _missing(hosts, here)
    say(f"{len(hosts.names)} hosts in Ray: {', '.join(hosts.names)}")
    return True


def _missing(hosts: Hosts, here: str) -> list[str]:
    """Hosts that are no live node now; all of them while Ray cannot be asked."""
    if not rendezvous.is_listening(here):  # Ray's client ends the process that waits for it too long
        return list(hosts.names)
    try:
        alive = rendezvous.live_nodes(f"{here}:{PORT}")
    except Exception:  # of gRPC, in several classes
        return list(hosts.names)
    return [name for name in hosts.names if not alive & _addresses(name)]


def _addresses(name: str) -> set[str]:
    try:
        return {rendezvous.address_of(name, 0)}
    except UserError:
        return set()


def _watch(
    hosts: Hosts, here: str, ray: subprocess.Popen[bytes], driver: _Driver, stop: Stop, elastic: bool
) -> Outcome:
    asked, counted, complete = False, time.monotonic(), time.monotonic()
    while (code := driver.process.poll()) is None:
        if stop.wanted() and not asked:
            asked = True
            say(f"asked to stop; the driver saves, for which it has {SAVE_S} s")
            driver.process.terminate()
        if stop.over():
            return Outcome(1, f"Asked to stop, and the save was not done after {SAVE_S} s. {driver.last()}")
        if ray.poll() is not None:
            return Outcome(1, f"Ray ended on {hosts.me} (exit code {ray.returncode}). {driver.last()}")
        now = time.monotonic()
        if now - counted > _COUNT_S and not asked:
            missing, counted = _missing(hosts, here), now
            complete = complete if missing else now
            if missing and not elastic and now - complete > hosts.timeout_s:
                return Outcome(1, f"{', '.join(missing)} left, and did not come back within {hosts.timeout_s:g} s.")
        time.sleep(_LOOK_S)
    if asked and code in (-signal.SIGTERM, 128 + signal.SIGTERM):  # before it had anything to save
        code = ASKED_TO_STOP
    code = 128 - code if code < 0 else code
    return Outcome(code, "" if code in (0, ASKED_TO_STOP) else driver.last())


class _Driver:
    """A process whose messages pass through, the last ones kept."""

    def __init__(self, command: list[str], hidden: list[str]):
        self._command, self._hidden = command, hidden
        self._lines: collections.deque[str] = collections.deque(maxlen=_LINES)

    def __enter__(self) -> _Driver:
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, errors="replace")
        self._thread = threading.Thread(target=self._pass, args=(self.process.stderr,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join(_END_S)

    def last(self) -> str:
        """The driver's last message, or its last lines where it ended without one."""
        self._thread.join(1)
        lines = list(self._lines)
        starts = [number for number, line in enumerate(lines) if line.startswith("manta: ")]
        return "".join(lines[starts[-1] :] if starts else lines[-10:])

    def _pass(self, stream: IO[str]) -> None:
        for line in stream:
            for value in self._hidden:
                line = line.replace(value, "…")
            self._lines.append(line)
            sys.stderr.write(line)
            sys.stderr.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
