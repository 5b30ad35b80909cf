"""Hosts on this machine: each with an address, a name, processes and temporary folders of its own, joined by a cable.

Linux namespaces do what containers do. Nothing of one host's /tmp or /dev/shm is seen on another, so that nothing is
shared but the code and the interpreter, which are read-only as in an installed image. No traffic leaves the hosts.
A host ends with its first process, and takes all others with it: there is nothing to clean up by name.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = Path("/tmp/work")  # on each host its own
_ALIVE_S = 1000  # no host outlives a test that hangs

# fd 9 is the code, which may itself be below /tmp; --no-canonicalize lets mount take it by its descriptor.
_BOOT = """
set -e
mount --make-rprivate /
exec 9<{root}
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
mkdir -p {work} {root}
mount --no-canonicalize --bind /proc/self/fd/9 {root}
mount -o remount,bind,ro {root}
exec 9<&-
hostname {name}
printf '%s\\n' '127.0.0.1 localhost' {names} > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
ip link set lo up
ip address add {address}/32 dev lo
touch {work}/.ready
exec sleep {alive}
"""


@dataclass
class Host:
    """`pid` is its first process, as this machine numbers it."""

    name: str
    address: str
    pid: int
    first: subprocess.Popen[bytes]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """Its file system, as seen from here."""
        return Path(f"/proc/{self.pid}/root")

    def path(self, name: str | Path) -> Path:
        """A file of its work folder, as seen from here."""
        return self.root / WORK.relative_to("/") / name

    def popen(self, command: list[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process there, its output in `log` of its work folder."""
        with self.path(log).open("ab") as file:
            return subprocess.Popen(
                [*self._enter(), *command], env=self._environment(environment), stdout=file, stderr=file
            )

    def run(self, command: list[str], timeout: float = 120, **environment: str) -> str:
        """What a process there prints; its errors are ours."""
        done = subprocess.run(
            [*self._enter(), *command],
            env=self._environment(environment),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{shlex.join(command)} on {self.name}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def plug(self, other: Host) -> None:
        """Join two hosts by a cable, which is gone with either of them."""
        with contextlib.suppress(AssertionError):  # the end of a cable to a lost host, whose kernel may still hold it
            self.run(["ip", "link", "delete", "eth0"])
        cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(other.pid)]
        subprocess.run(["nsenter", "--target", str(self.pid), "--net", *cable], check=True)  # pids as seen from here
        for here, there in ((self, other), (other, self)):
            here.run(["ip", "link", "set", "eth0", "up"])
            here.run(["ip", "route", "add", there.address, "dev", "eth0", "src", here.address])

    def lose(self) -> None:
        """As by a power cut: the cable is dead first, so that nobody gets a farewell, then every process."""
        with contextlib.suppress(AssertionError, OSError):
            self.run(["ip", "link", "set", "eth0", "down"], timeout=10)
        self.end()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.first.wait(10)

    def _enter(self) -> list[str]:
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid"]
        return ["nsenter", "--target", str(self.pid), *namespaces, f"--wdns={WORK}", "--"]

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Ray's variables are this host's own: `ray.init` in the tests' process leaves some in its environment."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**ours, **self.environment, **more}


def unavailable() -> str | None:
    """Why there can be no hosts here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if missing := [tool for tool in ("setpriv", "unshare", "nsenter", "ip", "mount") if not shutil.which(tool)]:
        return f"{', '.join(missing)} is not installed"
    probe = "mount -t tmpfs tmpfs /tmp && ip link add eth0 type veth peer name eth1"
    tried = subprocess.run([*_UNSHARE, "sh", "-c", probe], capture_output=True, text=True, timeout=30)
    return f"namespaces cannot be made: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def network(**addresses: str) -> Iterator[Network]:
    """Hosts by name and address; all of them end with the block, and every process on them."""
    net = Network(addresses)
    try:
        for name in addresses:
            net.boot(name)
        yield net
    finally:
        for host in net.hosts.values():
            host.end()


class Network:
    """Hosts that know each other's names. A lost one boots again as a new one of the same name."""

    def __init__(self, addresses: Mapping[str, str]):
        self.addresses = addresses
        self.hosts: dict[str, Host] = {}

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def boot(self, name: str) -> Host:
        """Start a host with empty folders."""
        script = _BOOT.format(
            root=ROOT,
            work=WORK,
            name=name,
            names=" ".join(shlex.quote(f"{address} {each}") for each, address in self.addresses.items()),
            address=self.addresses[name],
            alive=_ALIVE_S,
        )
        with tempfile.TemporaryFile() as log:
            first = subprocess.Popen([*_UNSHARE, "sh", "-c", script], stdout=log, stderr=log)
            host = Host(name, self.addresses[name], 0, first, {"HOME": str(WORK), "TMPDIR": "/tmp"})
            limit = time.monotonic() + 30
            while not (host.pid and host.path(".ready").exists()):
                children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
                host.pid = int((children.read_text().split() or ["0"])[0]) if first.poll() is None else 0
                if first.poll() is not None or time.monotonic() > limit:
                    log.seek(0)
                    first.kill()
                    raise RuntimeError(f"{name} does not start: {log.read().decode()}")
                time.sleep(0.05)
        self.hosts[name] = host
        return host


# It dies with this process, and its first process with it.
_UNSHARE = [
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    "--net",
    "--uts",
    "--ipc",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
