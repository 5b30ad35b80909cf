"""Ray Serve around the API and its engines, from start to SIGTERM.

One deployment is the API, which needs no model; each copy of weights is a deployment of its own, on a GPU where there
is one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from manta import cluster
from manta.config import Config
from manta.errors import UserError
from manta.serving.catalog import Weights
from manta.serving.generation import Delta, Engine, EngineError, Request
from manta.serving.service import Settings

APP = "manta"


@dataclass(frozen=True)
class Plan:
    """Where and how to serve. `drain_s` is how long requests under way may take after a SIGTERM."""

    settings: Settings
    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_batch: int = 32
    max_batch_tokens: int = 65_536
    drain_s: float = 30
    ray_address: str | None = None

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def serve(catalog: Sequence[Weights], plan: Plan, ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM or Ctrl-C; returns how many answers were cut off. `ready` is told the URL once it is up.

    Raises UserError if the port is taken, vLLM is asked for and not installed, or the cluster has no room.
    """
    engine = chosen_engine(plan.engine)
    _check_port(plan)
    with cluster.connected(Config(device=plan.device, ray_address=plan.ray_address)):
        on = cluster.device(Config(device=plan.device))
        resources = _resources(len(catalog), on)
        cluster.check_fits(len(catalog), {name: float(amount) for name, amount in resources.items()})
        from ray import serve as ray_serve

        for name in ("ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with _asked_to_stop() as stop:
            ray_serve.start(http_options={"host": plan.host, "port": plan.port}, logging_config=_LOGGING)
            try:
                handle = ray_serve.run(application(catalog, plan, engine, on, resources), name=APP, route_prefix="/")
            except RuntimeError as error:
                raise UserError(f"The models could not be loaded: {_reason(error)}") from error
            ready(plan.url)
            stop.wait()
            try:
                return handle.drain.remote(plan.drain_s).result(timeout_s=plan.drain_s + 10)
            finally:
                ray_serve.delete(APP)


_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}


def chosen_engine(wanted: str) -> str:
    """vllm where it is installed, else transformers. Raises UserError if it is asked for and missing."""
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise UserError(
            "--engine vllm, but vLLM is not installed. pip install 'ray[llm]', or use --engine transformers."
        )
    return ("vllm" if installed else "transformers") if wanted == "auto" else wanted


def application(catalog: Sequence[Weights], plan: Plan, engine: str, on: str, resources: dict[str, float]) -> Any:
    """The Ray Serve application: the API over one engine per copy of weights."""
    from ray import serve as ray_serve

    deployed: Any = ray_serve.deployment
    at_once = plan.settings.max_concurrency + 64  # the API itself says "busy"; the rest is for /health and the like
    options = {
        "max_ongoing_requests": at_once,
        "graceful_shutdown_timeout_s": 5,
        "health_check_period_s": 10,
    }
    engines = []
    for number, weights in enumerate(catalog):
        if engine == "vllm":
            from manta.serving.vllm import deployment

            engines.append(deployment(weights, plan, number, at_once))
            continue
        actor = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
        made = deployed(EngineServer, name=f"engine-{number}", ray_actor_options=actor, **options)
        engines.append(made.bind(weights, plan, on))
    api = deployed(ray_serve.ingress()(ApiServer), name="api", ray_actor_options={"num_cpus": 0}, **options)
    return api.bind(list(catalog), plan.settings, engine, *engines)


class EngineServer:
    """A replica with one copy of weights."""

    def __init__(self, weights: Weights, plan: Plan, on: str) -> None:
        from manta.serving.loading import load_engine
        from manta.serving.scheduler import Limits

        limits = Limits(plan.max_batch, plan.max_batch_tokens)
        self._engine = load_engine(weights, on, plan.dtype, limits)

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        async for delta in self._engine.generate(request):
            yield delta

    async def stats(self) -> dict[str, float]:
        return await self._engine.stats()

    async def check_health(self) -> None:
        """Ray Serve starts another replica if this raises."""
        self._engine.check()


class ApiServer:
    """The replica that speaks HTTP."""

    def __init__(self, catalog: list[Weights], settings: Settings, engine: str, *handles: Any) -> None:
        from manta.serving.service import Service

        if engine == "vllm":
            from manta.serving.vllm import VllmEngine as Remote
        else:
            Remote = RemoteEngine  # type: ignore[misc, assignment]  # noqa: N806
        engines: dict[str, Engine] = {
            weights.source: Remote(handle) for weights, handle in zip(catalog, handles, strict=True)
        }
        self._service = Service(catalog, engines, settings)

    async def __serve_build_asgi_app__(self) -> Any:
        from manta.serving.api import build

        return build(self._service)

    async def drain(self, seconds: float) -> int:
        return await self._service.drain(seconds)


class RemoteEngine:
    """An `Engine` in another process, behind a handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        from ray.exceptions import RayError, TaskCancelledError

        answer = self._handle.options(stream=True).generate.remote(request)
        try:
            async for delta in answer:
                yield delta
        except TaskCancelledError as error:
            raise asyncio.CancelledError from error
        except RayError as error:
            raise EngineError(_reason(error)) from error
        finally:
            answer.cancel()

    async def stats(self) -> dict[str, float]:
        return await self._handle.stats.remote()


def _resources(engines: int, on: str) -> dict[str, float]:
    """What one engine reserves: a GPU, or its share of this machine's cores but one, which HTTP needs."""
    if on == "cuda":
        return {"CPU": 1, "GPU": 1}
    share = max(1, (os.cpu_count() or 1) - 1) / engines
    return {"CPU": int(share) if share >= 1 else round(share, 3)}


def _reason(error: BaseException) -> str:
    """The last line of a message that may hold a remote traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _check_port(plan: Plan) -> None:
    family = socket.AF_INET6 if ":" in plan.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((plan.host, plan.port))
        except OSError as error:
            raise UserError(f"{plan.url} cannot be served: {error.strerror}. Give another --host or --port.") from error


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM or Ctrl-C; a second one ends the process as before. After Ray's start, which sets its own."""
    asked = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
