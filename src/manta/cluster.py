"""The Ray cluster under a run: one of our own, or one to join; what it has, and whether that is enough."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from manta import forkserver, head, quiet
from manta.config import Config
from manta.errors import UserError
from manta.head import Head

# What Ray Train waits for, in seconds, set where the user has not; docs/faults.md says what follows from each.
TIMEOUTS = {
    # The controller looks for reports and failures this often; Ray's default of 2 s is the cost of each checkpoint.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # After a lost node Ray asks for the old number of workers this long before it counts what is there; default 60.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # A frozen process (SIGSTOP, a host that hangs) answers no health check; default 600.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # How late a drained node is noticed; a preemption may leave no more than 30 s. Default 5.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
_KNOCK_S = 10
# What is set where the command is typed, and holds for all workers: networks, and whether the hub is asked.
_FORWARDED = (
    "NCCL_",
    "TORCH_NCCL_",
    "GLOO_",
    "FI_",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    quiet.VARIABLE,
)


@dataclass(frozen=True)
class Begun:
    """A cluster of our own that is on its way, and what it has as Python for its processes, where that is not ours."""

    python: str | None
    head: Head | None


@contextmanager
def begun(config: Config, *modules: str) -> Iterator[Begun | None]:
    """For as long as the block: what `connected` would start first, for `config` to be checked meanwhile.

    None where there is a cluster to join. `modules` are what its processes run, and import. Where this process can
    share the libraries of workers with them, it imports those first.
    """
    _set_variables()
    if _address(config) or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        yield None
        return
    with ExitStack() as stack:
        server = stack.enter_context(forkserver.running(threads(config), *modules))
        python = str(server.python) if server else None
        # A Ray that is imported already would not hear of the token that a cluster is given.
        cluster = None if "ray" in sys.modules else stack.enter_context(head.running(python))
        if server:
            server.begin()
        yield Begun(python, cluster)


@contextmanager
def connected(config: Config, ahead: Begun | None = None) -> Iterator[None]:
    """Ray is up inside: what was `begun` ahead, or a cluster to join, or one of our own that ends with the block.

    A connection that was there before is left as it was.
    """
    _set_variables()
    import ray

    if ray.is_initialized():
        yield
        return
    address = _address(config)
    try:
        _knock(address)
        if address:
            head.join(address, {"env_vars": _for_the_controller()})
        elif ahead and ahead.head and (ours := ahead.head.address()):
            head.join(ours)
        else:
            head.start(ahead.python if ahead else None)
    except (OSError, ValueError) as error:
        where = address or "this machine"
        raise UserError(
            f"No Ray cluster at {where}: {error}. Start one with `ray start --head`, or leave out --ray_address for a "
            "cluster of Manta's own on this machine."
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        theirs, ours = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))[:2]
        raise UserError(
            f"The cluster at {address} runs Ray {theirs[0]} and Python {theirs[1]}, and this is Ray {ours[0]} and "
            f"Python {ours[1]}: they must be the same. Here: pip install 'ray=={theirs[0]}' under that Python, or "
            "start the cluster with ours."
        ) from error
    except Exception as error:
        if head.TIMED_OUT not in str(error):
            raise
        raise UserError(
            f"Ray did not start within its 30 s: this machine is busy (load {os.getloadavg()[0]:.0f} on "
            f"{os.cpu_count()} CPUs), or the disk of /tmp is slow. End what else runs, or set RAY_TMPDIR, and give the "
            "command again."
        ) from error
    try:
        for name in ("ray.data", "ray.train", "ray"):
            logging.getLogger(name).setLevel(head.level())
        yield
    finally:
        ray.shutdown()


def _address(config: Config) -> str | None:
    return config.ray_address or os.environ.get("RAY_ADDRESS")


def _set_variables() -> None:
    """Of this process and those that it starts, before Ray is imported."""
    for name, seconds in TIMEOUTS.items():
        os.environ.setdefault(name, seconds)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it repeats what workers print
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _for_the_controller() -> dict[str, str]:
    """Train's controller runs somewhere on the cluster, whose processes know nothing of our variables.

    Those of a Ray job are left out: Ray refuses to set a variable of one twice.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: os.environ[name] for name in TIMEOUTS if name not in given}


def forwarded() -> dict[str, str]:
    """Variables of this process that workers get on every node."""
    return {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}


def _knock(address: str | None) -> None:
    """Raises OSError if nobody listens at host:port; Ray itself tries for minutes."""
    host, separator, port = (address or "").removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()


def count(resource: str) -> int:
    """How many of a resource, such as GPU, the cluster has."""
    import ray

    return int(ray.cluster_resources().get(resource, 0))


def device(config: Config) -> str:
    """cuda or cpu, as asked and as the cluster has it. Raises UserError if cuda is asked for and there is none."""
    gpus = count("GPU")
    if config.device == "cuda" and not gpus:
        raise UserError("--device cuda, but the Ray cluster has no GPU. Use --device cpu, or join a cluster with GPUs.")
    if config.device == "auto":
        return "cuda" if gpus else "cpu"
    return config.device


def workers(config: Config, on: str) -> tuple[int, int]:
    """The fewest and the most workers to run with: as asked, else one per GPU, else 1."""
    default = count("GPU") if on == "cuda" else 1
    return config.worker_range or (default, default)


def resources_per_worker(config: Config, on: str) -> dict[str, float]:
    """What one worker reserves: as asked, else a GPU and a CPU, or a CPU."""
    return config.resources_per_worker or ({"CPU": 1.0, "GPU": 1.0} if on == "cuda" else {"CPU": 1.0})


def threads(config: Config) -> int:
    """With which a worker computes: as many as it has CPUs."""
    return max(1, int(resources_per_worker(config, config.device).get("CPU", 1)))


def check_fits(wanted: int, each: dict[str, float], placement: str = "SPREAD") -> None:
    """Raises UserError if the cluster's nodes cannot hold `wanted` workers, which Ray would wait for without an end."""
    nodes = [node["Resources"] for node in living_nodes()]
    per_node = [min(int(node.get(name, 0) // amount) for name, amount in each.items() if amount) for node in nodes]
    room, how = sum(per_node), ""
    if placement == "STRICT_SPREAD":
        room, how = sum(map(bool, per_node)), ", one on each node"
    elif placement == "STRICT_PACK":
        room, how = max(per_node, default=0), ", all on one node"
    if room < wanted:
        total = {name: sum(node.get(name, 0) for node in nodes) for name in each}
        raise UserError(
            f"{wanted} workers × {each}{how} asked, but the cluster has room for {room} ({len(nodes)} nodes, {total}). "
            "Lower --num_workers or --resources_per_worker."
        )


def check_room_beside(wanted: int, each: dict[str, float], beside: dict[str, float]) -> None:
    """Raises UserError if the cluster has less than `beside` in all besides `wanted` workers: it would never start."""
    import ray

    total = ray.cluster_resources()
    need = {name: wanted * each.get(name, 0) + amount for name, amount in beside.items()}
    if short := {name: total.get(name, 0) for name, amount in need.items() if total.get(name, 0) < amount}:
        raise UserError(
            f"metric_for_best needs {beside} beside {wanted} workers × {each}, but the cluster has {short}. Lower "
            "--num_workers or --validation_resources, or choose --metric_for_best eval_loss."
        )


def living_nodes() -> list[dict[str, Any]]:
    """As `ray.nodes()` describes them, without those that left or were lost."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def check_device_before_start(config: Config) -> None:
    """Raises UserError if cuda is asked for on a cluster of our own and this machine has no GPU; starts nothing."""
    if config.device == "cuda" and not _address(config):
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda, but this machine has no GPU that torch can use. Use --device cpu or auto.")
