"""Several hosts that know each other's names become one Ray: who leads, which address each has, who has come.

Shared by SageMaker's entry point and Slurm's. Nothing here imports Ray before a host has to be asked for.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass

from manta.errors import UserError

PORT = 6379
_PAUSE_S = 0.5
_ANSWER_S = 2.0


@dataclass(frozen=True)
class Hosts:
    """The hosts of a job, the leading one first; `timeout_s` is how long any of them is waited for."""

    names: tuple[str, ...]
    me: str
    timeout_s: float
    interface: str | None = None

    @property
    def leader(self) -> str:
        return self.names[0]

    @property
    def lead(self) -> bool:
        """Whether this host has Ray's head and the driver."""
        return self.me == self.leader


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """By length, then by name: algo-2 comes before algo-10, and all hosts agree without asking each other."""
    return tuple(sorted(set(names), key=lambda name: (len(name), name)))


def address_of(name: str, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> str:
    """The IPv4 address of a host, waited for: names are known some time after containers start.

    Loopback addresses do not count, since the other hosts would reach themselves by them. Raises UserError.
    """
    limit = time.monotonic() + timeout_s
    found: set[str] = set()
    while True:
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)}
        except OSError:
            found = set()
        usable = sorted(address for address in found if not address.startswith("127."))
        if usable:
            return usable[0]
        if time.monotonic() > limit or stopped():
            is_local = f" but {', '.join(sorted(found))}, which other hosts cannot reach" if found else ""
            raise UserError(f"The name {name} has no address{is_local}, after {timeout_s:g} s. Check the hosts' DNS.")
        time.sleep(_PAUSE_S)


def is_listening(address: str, port: int = PORT) -> bool:
    try:
        socket.create_connection((address, port), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def live_nodes(gcs: str) -> set[str]:
    """Addresses of the nodes that Ray takes for alive; those that left or were lost are in its list, too."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    nodes = GcsClient(address=gcs).get_all_node_info(timeout=_ANSWER_S).values()
    return {node.node_manager_address for node in nodes if node.state == GcsNodeInfo.ALIVE}


def set_ray_token(environ: MutableMapping[str, str], job: str, hosts: int, is_open: bool = False) -> None:
    """The token that Ray's nodes ask each other for, the same on all hosts and another one for each job.

    Derived from RAY_AUTH_TOKEN, a secret that all hosts were given by reference: names and numbers of a job are known
    to others, so no token can be made from these alone. A single host makes one up. Raises UserError.
    """
    secret = environ.get("RAY_AUTH_TOKEN")
    if secret:
        environ["RAY_AUTH_TOKEN"] = hmac.new(secret.encode(), f"manta {job}".encode(), hashlib.sha256).hexdigest()
    elif hosts == 1:
        environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif not is_open:
        raise UserError(
            f"Ray's nodes on {hosts} hosts need a secret in common, RAY_AUTH_TOKEN. Give it by reference "
            "(launch.secrets), or set MANTA_OPEN_RAY=1 where nobody else reaches the hosts."
        )
    environ["RAY_AUTH_MODE"] = "token" if "RAY_AUTH_TOKEN" in environ else "disabled"


def set_interface(environ: MutableMapping[str, str], interface: str | None) -> None:
    """What NCCL and gloo talk over, unless the user has said."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if interface else ():
        environ.setdefault(name, str(interface))


def secret_values(environ: MutableMapping[str, str], names: Iterable[str]) -> list[str]:
    """What must be in no log of ours."""
    return [environ[name] for name in (*names, "RAY_AUTH_TOKEN") if environ.get(name)]


def stop_file() -> str | None:
    """A file that asks for a save where signals cannot, as on Slurm, where they would end Ray, too."""
    return os.environ.get("MANTA_STOP_FILE")
