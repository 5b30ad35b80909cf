import json

import pytest
from click.testing import CliRunner

from manta import manifest
from manta.cli import main
from manta.config import Config
from manta.lease import Lease
from manta.runs import METRIC, Run


def manta(*arguments):
    done = CliRunner().invoke(main, ["runs", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, of which the first is the best, and no result: its driver was killed."""
    run = Run(tmp_path / "a-run")
    run.start(Config(hf_model_id="a-model"), tmp_path / "data")
    for step, loss in ((10, 1.0), (20, 2.0)):
        folder = run.path / f"checkpoint_{step:08d}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"w" * step)
        manifest.close(folder, manifest.digests(folder), {"step": step, "metrics": {METRIC: loss}})
    attempt = {"time": 0, "kind": "attempt", "attempt": 1, "world_size": 2, "step": 0}
    note = {"time": 1, "kind": "note", "text": "checkpoint_00000030 is put aside: it was damaged"}
    run.events_file.write_text("".join(json.dumps(event) + "\n" for event in (attempt, note)))
    return run


def test_runs_are_listed_with_their_state(run):
    code, output = manta("list", run.path.parent)
    assert code == 0 and "1 run in" in output
    assert "a-run  interrupted  20  1.0000  1" in " ".join(output.split()).replace(" ", "  ")
    with Lease(run):
        assert "running" in manta("list", run.path.parent)[1]
    run.result_file.write_text('{"status": "finished", "failure": null}')
    assert "finished" in manta("list", run.path.parent)[1]


def test_a_run_says_what_happened_to_it(run):
    code, output = manta("show", run.path)
    assert code == 0 and "a-model, LoRA of rank 32" in output
    assert "attempt 1: 2 workers, from step 0" in output and "checkpoint_00000030 is put aside" in output
    assert "checkpoint_00000010  eval_loss 1.0000  best" in output
    assert "checkpoint_00000020  eval_loss 2.0000  newest" in output


def test_a_checkpoint_that_is_not_as_it_was_written_is_an_exit_code(run):
    assert manta("verify", run.path) == (0, "checkpoint_00000010: whole\ncheckpoint_00000020: whole\n")
    (run.path / "checkpoint_00000020" / "weights").write_bytes(b"w" * 19 + b"x")
    code, output = manta("verify", run.path)
    assert code == 1 and "checkpoint_00000010: whole" in output
    assert "checkpoint_00000020: weights does not match its SHA-256" in output


def test_a_folder_that_is_no_run_is_a_message(tmp_path):
    code, output = manta("show", tmp_path)
    assert code == 2 and "is not a run" in output
