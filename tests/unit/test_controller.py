"""What Ray's exceptions of all ranks say together."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from manta.controller import explain, root_cause
from manta.errors import TrainingError

CLOSED = RuntimeError("[../gloo/transport/tcp/pair.cc:554] Connection closed by peer [192.0.2.1]:4242")
NCCL = RuntimeError("NCCL communicator was aborted on rank 1.")
DEAD = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
FROZEN = WorkerHealthCheckTimeoutError("hanging for 60 seconds")
BUG = KeyError("labels")


@pytest.mark.parametrize(
    ("errors", "cause", "said"),
    [
        ({0: CLOSED, 1: BUG}, "error", "rank 1: KeyError: 'labels'"),
        ({0: BUG, 1: NCCL, 2: DEAD}, "error", "rank 0: KeyError"),
        ({0: CLOSED, 1: DEAD}, "worker", "the process of rank 1 died"),
        ({0: CLOSED}, "worker", "a worker is gone; rank 0: RuntimeError"),
        ({0: CLOSED, 1: FROZEN}, "hang", "rank 1 answered no health check"),
    ],
)
def test_an_error_of_its_own_is_not_hidden_by_what_follows_from_it(errors, cause, said):
    assert explain(errors)[0] == cause
    assert explain(errors)[1].startswith(said)


def test_the_driver_says_what_was_judged():
    assert root_cause(ControllerError(TrainingError("Step 3 failed twice."))) == "Step 3 failed twice."
    assert root_cause(WorkerGroupError("…", {0: CLOSED, 1: BUG})) == "rank 1: KeyError: 'labels'"
    assert root_cause(ControllerError(OSError("disk"))) == "OSError: disk"
