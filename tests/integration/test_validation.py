"""Answers generated beside training: they choose the best checkpoint and the end, and their failure ends nothing."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from manta import snapshot, validation
from manta.config import Config
from manta.errors import ConfigError, UserError
from manta.manifest import read_json
from manta.runs import Run
from manta.train import train
from running import lines, run_of, small_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validation")


def config(folder: Path, name: str, **settings: Any) -> Config:
    """One worker: the cluster's other CPU answers."""
    beside = {"metric_for_best": "rougeL", "validation_samples": 6, "validation_max_tokens": 24, "num_workers": 1}
    steps = {"max_steps": 60, "eval_steps": 20, "save_steps": 100, "early_stopping_patience": 0}
    return small_config(folder, run_name=name, **beside | steps | settings)


def told(run: Run) -> dict[int, dict[str, Any]]:
    return {event["step"]: event for event in lines(run.events_file) if event["kind"] == "validation"}


def notes(run: Run) -> str:
    return "\n".join(event["text"] for event in lines(run.events_file) if event["kind"] == "note")


def test_the_best_checkpoint_is_best_in_its_answers(folder):
    result = train(config(folder, "best", save_total_limit=3))
    run = run_of(result)
    found = told(run)
    assert list(found) == [20, 40, 60]
    best = max(found.values(), key=lambda event: event["rougeL"])
    assert Path(result["best_checkpoint"]).name == run.best().path.name == best["checkpoint"]
    assert result["metric"] == "rougeL" and result["best_metric"] == best["rougeL"] > 0
    again = validation.figures(str(run.path), best["checkpoint"], run.config().to_dict(), str(run.prepared()))
    assert again == {name: best[name] for name in again} and {"exact_match", "bleu", "loss"} <= again.keys()
    listed = read_json(run.path / snapshot.NAME)
    assert listed is not None
    by_ray = [entry["metrics"]["rougeL"] for entry in listed["checkpoint_results"]]
    assert by_ray == sorted(event["rougeL"] for event in found.values())


def test_a_validator_that_dies_each_time_costs_its_figures_only(folder):
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.05):
            for process in psutil.process_iter(["cmdline"]):
                with contextlib.suppress(psutil.Error):
                    if "ray::figures" in " ".join(process.info["cmdline"] or []):
                        process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = train(config(folder, "dies", max_steps=30, eval_steps=15))
    finally:
        over.set()
        killer.join()
    run = run_of(result)
    assert result["status"] == "finished" and result["attempts"] == 1 and result["best_metric"] is None
    assert told(run) == {} and notes(run).count("have no figures") == 2
    assert run.best().step == 30


def test_figures_that_no_longer_rise_end_the_run(folder):
    settings = {"early_stopping_patience": 1, "early_stopping_threshold": 2.0}  # no figure can rise so much
    result = train(config(folder, "early", max_steps=2000, eval_steps=20, **settings))
    run = run_of(result)
    assert result["status"] == "finished" and result["stopped_early"] and result["steps"] < 2000
    assert "stopped early: rougeL no longer rose" in notes(run)
    assert run.latest().step == result["steps"]


def test_without_room_beside_the_workers_nothing_starts(folder):
    with pytest.raises(UserError, match=r"metric_for_best needs .* beside 2 workers"):
        train(config(folder, "no-room", num_workers=2))
    assert not (folder / "results" / "no-room" / "config.yaml").exists()
    with pytest.raises(ConfigError, match="validation split"):
        config(folder, "no-split", eval_steps=0)
