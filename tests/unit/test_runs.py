import math

import pytest

from manta import manifest, runs
from manta.config import Config
from manta.errors import UserError
from manta.runs import Run


def add_run(results, name, **settings):
    run = Run(results / name)
    run.path.mkdir(parents=True)
    run.config_file.write_text(Config(**settings).dump(), encoding="utf-8")
    return run


def add_checkpoint(run, step, eval_loss=None, closed=True):
    path = runs.checkpoint_path(run.path, step)
    path.mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"w" * step)
    if closed:
        metrics = {} if eval_loss is None else {"eval_loss": eval_loss}
        manifest.close(path, manifest.digests(path), {"step": step, "metrics": metrics})
    return path


@pytest.fixture
def run(tmp_path):
    return add_run(tmp_path / "results", "one")


def test_a_run_without_checkpoints_has_no_best_and_no_latest(run):
    assert run.checkpoints() == []
    assert run.latest() is None
    assert run.best() is None


def test_a_run_that_does_not_exist_has_no_checkpoints(tmp_path):
    assert Run(tmp_path / "nowhere").checkpoints() == []
    assert Run(tmp_path / "nowhere").remove_unfinished() == []


def test_checkpoints_come_oldest_first_with_their_metrics(run):
    for step in (120, 9, 60):
        add_checkpoint(run, step, eval_loss=step / 100)
    found = run.checkpoints()
    assert [checkpoint.step for checkpoint in found] == [9, 60, 120]
    assert [checkpoint.eval_loss for checkpoint in found] == [0.09, 0.6, 1.2]
    assert found[0].path == run.path / "checkpoint_00000009"


def test_latest_is_the_highest_step_and_best_the_lowest_loss(run):
    for step, loss in [(10, 0.9), (20, 0.5), (30, 0.7)]:
        add_checkpoint(run, step, loss)
    assert run.latest().step == 30
    assert run.best().step == 20


def test_of_equal_losses_the_newest_is_best(run):
    for step in (10, 20):
        add_checkpoint(run, step, 0.5)
    assert run.best().step == 20


def test_without_any_evaluation_the_newest_is_best(run):
    for step in (10, 20):
        add_checkpoint(run, step)
    assert run.best().step == 20


def test_a_checkpoint_without_evaluation_is_not_best(run):
    add_checkpoint(run, 10, 3.0)
    add_checkpoint(run, 20)
    assert run.best().step == 10


def test_a_loss_of_nan_is_never_best(run):
    add_checkpoint(run, 5, math.nan)
    add_checkpoint(run, 10, 3.0)
    add_checkpoint(run, 20, math.nan)
    assert run.best().step == 10
    assert run.latest().step == 20


def test_an_unfinished_checkpoint_is_not_used_and_can_be_removed(run):
    add_checkpoint(run, 10, 0.5)
    unfinished = add_checkpoint(run, 20, closed=False)
    unreadable = add_checkpoint(run, 30, 0.1)
    (unreadable / manifest.NAME).write_text('{"format": 1')
    (run.path / "checkpoint_manager_snapshot.json").write_text("{}")
    assert run.latest().step == run.best().step == 10
    assert sorted(run.remove_unfinished()) == [unfinished.name, unreadable.name]
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoint_00000010",
        "checkpoint_manager_snapshot.json",
        "config.yaml",
    ]


def test_a_run_has_its_config_and_its_result(run):
    assert run.config() == Config()
    assert run.result() is None
    manifest.write_json(run.result_file, {"status": "finished"})
    assert run.result() == {"status": "finished"}


def test_the_same_settings_name_the_same_run_and_others_another():
    assert runs.of(Config(num_workers=2)) == runs.of(Config(num_workers=5))
    assert runs.of(Config(max_steps=3)) != runs.of(Config())
    assert runs.of(Config(hf_model_id="Qwen/Qwen3-0.6B")) != runs.of(Config())


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "/models/Qwen3-8B/", "Qwen3-8B"])
def test_a_run_is_named_after_its_model_and_method(model):
    assert runs.default_name(Config(hf_model_id=model)).startswith("Qwen3-8B-lora-")
    assert runs.default_name(Config(hf_model_id=model, full_ft=True)).startswith("Qwen3-8B-full-")


def test_a_run_name_is_used_as_given(tmp_path):
    assert runs.of(Config(results_dir=str(tmp_path), run_name="mine")).path == tmp_path / "mine"


def test_the_only_run_with_checkpoints_is_found(tmp_path):
    wanted = add_run(tmp_path, "with")
    add_checkpoint(wanted, 10)
    add_run(tmp_path, "without")
    add_checkpoint(add_run(tmp_path, "unfinished"), 10, closed=False)
    (tmp_path / "notes.txt").touch()
    assert runs.find(tmp_path) == wanted


def test_no_run_is_a_message(tmp_path):
    add_run(tmp_path, "without")
    with pytest.raises(UserError, match=r"No run of Qwen/Qwen3-8B with a checkpoint .*--checkpoints_dir"):
        runs.find(tmp_path, "Qwen/Qwen3-8B")
    with pytest.raises(UserError, match="No run with a checkpoint"):
        runs.find(tmp_path / "nowhere")


def test_of_several_runs_none_is_guessed(tmp_path):
    for name in ("a", "b"):
        add_checkpoint(add_run(tmp_path, name), 10)
    with pytest.raises(UserError) as raised:
        runs.find(tmp_path)
    message = str(raised.value)
    assert "2 runs" in message
    assert f"--run {tmp_path / 'a'}" in message
    assert f"--run {tmp_path / 'b'}" in message


def test_a_run_is_found_by_base_model_and_method(tmp_path):
    """The guide takes the newest checkpoint of whatever model shares the folder."""
    small = add_run(tmp_path, "small", hf_model_id="Qwen/Qwen3-0.6B")
    lora = add_run(tmp_path, "lora")
    full = add_run(tmp_path, "full", full_ft=True)
    for number, run in enumerate((lora, full, small)):
        add_checkpoint(run, 10 + number)
    assert runs.find(tmp_path, "Qwen/Qwen3-0.6B") == small
    assert runs.find(tmp_path, "Qwen/Qwen3-8B", full_ft=False) == lora
    assert runs.find(tmp_path, "Qwen/Qwen3-8B", full_ft=True) == full
    with pytest.raises(UserError, match="2 runs of Qwen/Qwen3-8B"):
        runs.find(tmp_path, "Qwen/Qwen3-8B")


def test_a_local_base_model_is_found_by_the_path_that_was_typed(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    run = add_run(tmp_path / "results", "local", hf_model_id=str(tmp_path / "base"))
    add_checkpoint(run, 10)
    monkeypatch.chdir(tmp_path)
    assert runs.find("results", "base") == run
    assert runs.find("results", "./base/") == run


def test_a_run_is_opened_by_its_folder(run, tmp_path):
    assert runs.open_run(run.path) == run
    with pytest.raises(UserError, match="is not a run"):
        runs.open_run(tmp_path)
