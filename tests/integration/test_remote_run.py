"""Runs and prepared data on an object store: what a local folder gives, without any folder that nodes share."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from manta import history, lease, ledger, runs, storage
from manta.convert import convert
from manta.data.prepare import Prepared
from manta.errors import UserError
from manta.manifest import damage
from manta.runs import Run
from manta.train import train
from running import logged, max_gap, order_of, run_of, small_config, wait_for
from s3 import s3_server

pytestmark = pytest.mark.slow

STEPS, SAVE = 180, 20


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    with s3_server("store"):
        yield "s3://store"


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=log, stderr=log)


def latest_step(run: Run) -> int:
    latest = run.latest()
    return latest.step if latest else 0


@pytest.mark.parametrize("full_ft", [False, True], ids=["lora", "full"])
def test_killed_and_resumed_on_a_store_ends_as_undisturbed_on_a_disk(full_ft, bucket, tmp_path, ray_cluster):
    """A worker is killed, then the driver with all its processes, then this machine's copies are gone, too."""
    settings = {"max_steps": STEPS, "save_steps": SAVE, "eval_steps": 90, "full_ft": full_ft, "run_name": "run"}
    undisturbed = small_config(tmp_path, **settings)
    config = small_config(tmp_path, **settings, results_dir=f"{bucket}/runs", data_dir="prepared")
    (tmp_path / "recipe.yaml").write_text(config.dump())
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "manta", "train", "--config", str(tmp_path / "recipe.yaml")]
    run = runs.of(config)

    driver = start(command, work)
    family: list[psutil.Process] = []
    try:
        wait_for(lambda: latest_step(run) >= SAVE or driver.poll() is not None)
        assert driver.poll() is None, (work / "driver.log").read_text()
        wait_for(run.world_sizes)
        os.kill(run.events()[0]["workers"][1]["pid"], signal.SIGKILL)
        wait_for(lambda: len(run.world_sizes()) == 2 and latest_step(run) >= 3 * SAVE)
        with pytest.raises(UserError, match=rf"Another driver is training {run.path}: process {driver.pid}"):
            lease.refuse_if_held(run.path)
        family = psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.wait()
    committed = latest_step(run)
    assert 3 * SAVE <= committed < STEPS
    shutil.rmtree(tmp_path / "cache")
    again = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    result = run.result()
    assert result["status"] == "finished" and result["steps"] == STEPS and result["attempts"] == 3
    assert [event["step"] for event in run.events() if event["kind"] == "attempt"][2] == committed
    assert list(work.iterdir()) == [work / "driver.log"]  # all else is on the store, or in the cache

    order = order_of(run.config())
    expected = [
        (step, index, order.micro_batch(step, index)) for step in range(STEPS) for index in range(order.micro_batches)
    ]
    assert ledger.read(run.ledger, STEPS) == expected
    before = run_of(train(undisturbed))
    ours, theirs = logged(run, "loss"), logged(before, "loss")
    # The killed driver had lines in memory that it would have written with the next checkpoint's, or 5 s later.
    assert set(theirs) - set(ours) <= set(range(committed - SAVE + 1, committed + 1)) and set(ours) <= set(theirs)
    assert max_gap(ours, {step: theirs[step] for step in ours}) <= 1e-5
    assert run.best().eval_loss == pytest.approx(before.best().eval_loss, abs=1e-5)
    assert [found.step for found in run.checkpoints()] == [found.step for found in before.checkpoints()]
    assert all(damage(found.path) is None for found in run.checkpoints())  # as it is on the store, byte by byte
    host, *_ = run.logs.iterdir()
    assert {log.name for log in host.iterdir()} == {"worker-00000.log", "worker-00001.log"}
    assert Prepared(run.prepared()).path.parent == run.path.parent / "prepared"
    assert history.state(run) == "finished"

    export = convert(run)
    assert str(export) == f"{bucket}/runs/run/export" and damage(export) is None
    here, at_home = evaluated(run), evaluated(before)
    assert here["models"]["tuned"]["loss"] == pytest.approx(at_home["models"]["tuned"]["loss"], abs=1e-4)


def evaluated(run: Run) -> dict[str, Any]:
    """By a process of its own, whose Ray has the store's credentials."""
    command = [sys.executable, "-m", "manta", "evaluate", "--run", str(run.path), "--max_samples", "4"]
    done = subprocess.run([*command, "--max_tokens", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((run.path / "evaluation" / "metrics.json").read_text())
