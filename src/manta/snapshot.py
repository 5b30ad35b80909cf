"""Ray Train's own list of checkpoints, made right before a run goes on.

Ray rewrites the list in place. If it is cut off, names a folder that is gone, or was written by another version of Ray,
`fit` raises and the run cannot go on; and it lists damaged checkpoints like others. The manifests are the truth: from
them the list is made anew. Format: ray/train/v2/_internal/execution/checkpoint/checkpoint_manager.py of Ray 2.60.
"""

from __future__ import annotations

from typing import Any

from manta import manifest, storage
from manta.config import GENERATED
from manta.runs import METRIC, Checkpoint, Run

NAME = "checkpoint_manager_snapshot.json"
DAMAGED = "damaged-"


def repair(run: Run) -> list[str]:
    """Put damaged checkpoints aside and make the list agree with those that are whole; returns what was done.

    Local checkpoints are verified by hash, remote ones by size: whoever uses one of these hashes what it fetched.
    """
    import ray

    done = []
    for found in run.checkpoints():
        if problem := manifest.damage(found.path, content=not storage.is_remote(found.path)):
            aside = found.path.with_name(f"{DAMAGED}{found.path.name}")
            storage.move(found.path, aside)
            done.append(f"{found.path.name} is put aside: {problem}")
    whole = run.checkpoints()
    path = run.path / NAME
    listed = manifest.read_json(path)
    if listed is None and not path.exists() and not whole:
        return done
    if listed is None or listed.get("ray_version") != ray.__version__ or _names(listed) != {c.path.name for c in whole}:
        manifest.write_json(path, _listing(run, ray.__version__))
        done.append(f"Ray's list of checkpoints is made anew from {len(whole)} manifests")
    return done


def _names(listed: dict[str, Any]) -> set[str] | None:
    """Folders that a list names; None if it is not a list of Ray's form."""
    results, latest = listed.get("checkpoint_results"), listed.get("latest_checkpoint_result")
    try:
        names = {result["checkpoint_dir_name"] for result in results or []}
        return names if not latest or latest["checkpoint_dir_name"] in names else None
    except (TypeError, KeyError):
        return None


def _listing(run: Run, version: str) -> dict[str, Any]:
    """Ray keeps results from the worst to the best, and for each which report it came with."""
    by_score = run.ranked()[::-1]
    by_step = sorted(by_score, key=lambda checkpoint: checkpoint.step)
    told = run.validations()
    return {
        "ray_version": version,
        "checkpoint_results": [_result(checkpoint, told) for checkpoint in by_score],
        "checkpoint_report_indices": [by_step.index(checkpoint) for checkpoint in by_score],
        "latest_checkpoint_result": _result(by_step[-1], told) if by_step else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(by_step),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _result(checkpoint: Checkpoint, told: dict[str, dict[str, Any]]) -> dict[str, Any]:
    metrics: dict[str, Any] = {"step": checkpoint.step}
    if METRIC in checkpoint.metrics:
        metrics[METRIC] = checkpoint.metrics[METRIC]
    for name in GENERATED & told.get(checkpoint.path.name, {}).keys():
        metrics[name] = told[checkpoint.path.name][name]
    return {"version": 0, "checkpoint_dir_name": checkpoint.path.name, "metrics": metrics}
