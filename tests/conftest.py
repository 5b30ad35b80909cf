from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from running import CANARY


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the whole session, which `manta.train.train` uses as it finds it. Two CPUs: two workers fit.

    Its processes are forked, as those of a Ray that Manta starts: a run begins in half the time.

    Every worker has a secret in its environment, as a user's workers have.
    """
    # As Manta sets them before a Ray of its own: how soon a report or a dead worker is seen, and no GPU for workers.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    from manta import forkserver, head

    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = CANARY
    with forkserver.running(threads=1) as server:
        if server:
            server.begin()
        try:
            head.start(str(server.python) if server else None, num_cpus=2)
            yield
        finally:
            ray.shutdown()
            os.environ.pop("HF_TOKEN")
            if before is not None:
                os.environ["HF_TOKEN"] = before
