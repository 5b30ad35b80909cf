"""A run's figures for Prometheus, read from its status whenever they are asked for: `--metrics_port`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from manta.errors import UserError
from manta.runs import METRIC
from manta.status import STATES, Status

# Attribute of the status → name after `manta_train_`, and what it is.
_GAUGES = {
    "step": ("step", "Optimizer steps done; a restart can set it back"),
    "max_steps": ("max_steps", "Optimizer steps of the whole run"),
    "epoch": ("epoch", "Passes over the data, as of the last log line"),
    "loss": ("loss", "Training loss of the last log line"),
    "learning_rate": ("learning_rate", "Learning rate of the last log line"),
    "grad_norm": ("grad_norm", "Norm of the gradient before clipping, of the last log line"),
    "tokens_per_second": ("tokens_per_second", "Tokens of all workers per second, over the last half minute"),
    "eta_s": ("eta_seconds", "Seconds to the last step at the present speed"),
    "workers": ("workers", "Training workers of this attempt"),
    "attempt": ("attempt", "Number of the attempt, over all drivers of the run"),
    "checkpoint_step": ("checkpoint_step", "Step of the newest checkpoint"),
    "checkpoint_time": ("checkpoint_timestamp_seconds", "When the newest checkpoint was whole, in UNIX seconds"),
    "began": ("start_timestamp_seconds", "When this driver began, in UNIX seconds"),
}
_COUNTERS = {
    "tokens": ("tokens", "Tokens computed since this driver began; steps done again count again"),
    "restarts": ("restarts", "Restarts of the workers since this driver began"),
}


class RunCollector(Collector):
    """What has no value yet is left out of a scrape."""

    def __init__(self, status: Status):
        self.status = status

    def collect(self) -> Iterable[Metric]:
        values = self.status.as_dict()
        label, run = ["run"], [values["run"]]
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for attribute, (name, text) in table.items():
                family: Any = kind(f"manta_train_{name}", text, labels=label)
                if values[attribute] is not None:
                    family.add_metric(run, values[attribute])
                yield family
        figures = GaugeMetricFamily("manta_train_eval", "Newest figure of an evaluation", labels=["run", "metric"])
        evaluated = {METRIC: values["eval_loss"], **values["answers"]}
        for metric, value in evaluated.items():
            if value is not None:
                figures.add_metric([*run, metric], value)
        yield figures
        state = GaugeMetricFamily("manta_train_state", "1 for the state that the run is in", labels=["run", "state"])
        for name in STATES:
            state.add_metric([*run, name], float(name == values["state"]))
        yield state


@contextmanager
def served(status: Status, host: str, port: int) -> Iterator[None]:
    """The figures of `status` over HTTP while in the block; with port 0, nothing. Raises UserError if it is in use."""
    if not port:
        yield
        return
    registry = CollectorRegistry()
    registry.register(RunCollector(status))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UserError(
            f"--metrics_port {port} cannot be opened at {host} ({error.strerror or error}). Choose another, or leave "
            "it out."
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
