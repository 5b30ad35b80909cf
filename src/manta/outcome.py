"""How a run ended: `result.json`, what is said of a failure, and the exit code."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from manta import __version__
from manta.config import Config
from manta.runs import METRIC, Run

if TYPE_CHECKING:
    from manta.progress import Monitor

FINISHED: Final = "finished"
STOPPED: Final = "stopped"
FAILED: Final = "failed"

# Exit code of a run that saved and left because of a SIGTERM: "try again", as sysexits.h has it.
ASKED_TO_STOP = 75


def summarize(
    config: Config,
    run: Run,
    steps: int,
    outcome: dict[str, Any],
    monitor: Monitor,
    began: float,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What result.json holds. `outcome` is what the workers returned, or `{"failure": …}`; `seconds` of each phase."""
    failure = outcome.get("failure")
    done = outcome.get("step", 0)
    asked = monitor.stop_wanted.is_set()
    stopped = done < steps and (asked or (config.stop_at_step is not None and config.stop_at_step <= done))
    best, latest = run.best(), run.latest()
    trained_s = (monitor.last_step_time or 0) - (monitor.first_step_time or 0)
    return {
        "status": FAILED if failure else STOPPED if stopped else FINISHED,
        "failure": failure,
        "run": str(run.path),
        "steps": done or (latest.step if latest else 0),
        "max_steps": steps,
        "asked_to_stop": asked,
        "stopped_early": not failure and not stopped and done < steps,
        "metric": config.metric_for_best,
        "best_metric": outcome.get("best_eval_loss") if config.metric_for_best == METRIC else run.best_value(),
        "best_checkpoint": str(best.path) if best else None,
        "latest_checkpoint": str(latest.path) if latest else None,
        "train_loss": outcome.get("train_loss"),
        "epoch": outcome.get("epoch"),
        "attempts": len(run.world_sizes()),
        "world_sizes": run.world_sizes(),
        "skipped_steps": len({event["skipped_step"] for event in run.events() if "skipped_step" in event}),
        "tokens": monitor.tokens,
        "tokens_per_second": round(monitor.tokens_timed / trained_s, 1) if trained_s > 0 else None,
        "seconds": {**seconds, "total": round(time.time() - began, 3)},
        "sharding": outcome.get("sharding"),
        "manta": __version__,
    }


def why_failed(run: Run, result: dict[str, Any]) -> str:
    """What to say of a run whose result is `failed`."""
    return (
        f"{run.name} failed: {result['failure']}\nWorker logs: {run.logs}. The same command goes on from "
        f"{result['latest_checkpoint'] or 'the start'}."
    )


def exit_code(result: dict[str, Any]) -> int:
    """0: finished, or stopped at the step it was told to; 75: asked to stop by a signal; 1: failed."""
    if result["status"] == STOPPED and result["asked_to_stop"]:
        return ASKED_TO_STOP
    return int(result["status"] == FAILED)
