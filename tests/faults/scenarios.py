"""All scenarios, in the order of the matrix; each is one group of rows that share a run."""

from __future__ import annotations

from collections.abc import Callable

from faults import disk, drivers, inputs, nodes, secrets_kept, stuck, workers
from faults.bench import Bench

SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "workers": workers.workers,
    "full": workers.full,
    "drivers": drivers.drivers,
    "loss": nodes.loss,
    "drain": nodes.drain,
    "disk": disk.disk,
    "stuck": stuck.stuck,
    "loader": workers.loader,
    "non_finite": inputs.non_finite,
    "repeated": inputs.repeated,
    "bad_rows": inputs.bad_rows,
    "truncated": inputs.truncated,
    "wrong_config": inputs.wrong_config,
    "secrets": secrets_kept.secrets,  # the last: it looks at what the others left
}
