import json

import pytest
import ray
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from manta import manifest, snapshot
from manta.runs import METRIC, Run


def checkpoint(run, step, loss=None, name=None):
    folder = run.path / (name or f"checkpoint_{step:08d}")
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"w" * step)
    metrics = {} if loss is None else {METRIC: loss}
    manifest.close(folder, manifest.digests(folder), {"kind": "checkpoint", "step": step, "metrics": metrics})
    return folder


def listed(run):
    """As Ray reads its list: names from the worst to the best, and the newest."""
    state = _CheckpointManagerState.parse_obj(json.loads((run.path / snapshot.NAME).read_text()))
    assert len(state.checkpoint_results) == len(state.checkpoint_report_indices)
    latest = state.latest_checkpoint_result
    names = [result.checkpoint_dir_name for result in state.checkpoint_results]
    order = dict(zip(names, state.checkpoint_report_indices, strict=True))
    assert state.current_report_index == len(names) and sorted(order.values()) == list(range(len(names)))
    assert latest is None or order[latest.checkpoint_dir_name] == len(names) - 1
    return names, latest and latest.checkpoint_dir_name


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, of which the middle is the best, and Ray's list of them."""
    run = Run(tmp_path / "a-run")
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        checkpoint(run, step, loss)
    assert len(snapshot.repair(run)) == 1
    return run


WHOLE = (["checkpoint_00000010", "checkpoint_00000030", "checkpoint_00000020"], "checkpoint_00000030")


def test_a_list_that_agrees_with_the_manifests_is_left_alone(run):
    assert listed(run) == WHOLE
    before = (run.path / snapshot.NAME).stat().st_mtime_ns
    assert snapshot.repair(run) == []
    assert (run.path / snapshot.NAME).stat().st_mtime_ns == before


def test_a_run_that_has_not_saved_yet_needs_no_list(tmp_path):
    run = Run(tmp_path)
    assert snapshot.repair(run) == [] and not (tmp_path / snapshot.NAME).exists()


@pytest.mark.parametrize("harm", ["cut off", "empty", "gone", "another Ray", "no list", "of other names"])
def test_a_list_that_ray_would_choke_on_is_made_anew(run, harm):
    path = run.path / snapshot.NAME
    text = path.read_text()
    if harm == "gone":
        path.unlink()
    else:
        harmed = {
            "cut off": text[: len(text) // 2],
            "empty": "",
            "another Ray": text.replace(ray.__version__, "2.59.0"),
            "no list": "[1]",
            "of other names": text.replace("checkpoint_dir_name", "name"),
        }
        path.write_text(harmed[harm])
    assert snapshot.repair(run) == ["Ray's list of checkpoints is made anew from 3 manifests"]
    assert listed(run) == WHOLE


def test_a_listed_folder_that_is_gone_is_no_longer_listed(run):
    for path in sorted((run.path / "checkpoint_00000030").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run.path / "checkpoint_00000030").rmdir()
    snapshot.repair(run)
    assert listed(run) == (["checkpoint_00000010", "checkpoint_00000020"], "checkpoint_00000020")


def test_a_complete_checkpoint_that_ray_had_not_listed_yet_is(run):
    checkpoint(run, 40)
    snapshot.repair(run)
    names = ["checkpoint_00000040", "checkpoint_00000010", "checkpoint_00000030", "checkpoint_00000020"]
    assert listed(run) == (names, "checkpoint_00000040")


def test_a_damaged_checkpoint_is_put_aside_and_its_name_is_free(run):
    (run.path / "checkpoint_00000030" / "model" / "weights").write_bytes(b"w" * 29 + b"x")
    first, second = snapshot.repair(run)
    assert first.startswith("checkpoint_00000030 is put aside: ") and "SHA-256" in first and "anew" in second
    assert listed(run) == (["checkpoint_00000010", "checkpoint_00000020"], "checkpoint_00000020")
    assert (run.path / "damaged-checkpoint_00000030").is_dir()
    assert [found.step for found in run.checkpoints()] == [10, 20]
    checkpoint(run, 30, 2.0)
    (run.path / "checkpoint_00000030" / "model" / "weights").unlink()
    assert "put aside" in snapshot.repair(run)[0]


def test_a_checkpoint_that_was_saved_again_beside_a_damaged_one_is_listed_by_its_name(run):
    checkpoint(run, 40, 0.5, name="checkpoint_00000040.1")
    snapshot.repair(run)
    assert listed(run)[1] == "checkpoint_00000040.1"
