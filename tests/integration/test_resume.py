"""Runs that are killed, stopped, moved to another number of workers or damaged: they end as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from manta import heap, ledger
from manta.config import Config
from manta.errors import ConfigError
from manta.outcome import ASKED_TO_STOP
from manta.runs import Run
from manta.train import train
from running import lines, logged, max_difference, max_gap, order_of, prepared_of, run_of, small_config, weights
from tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STEPS = 24
SAVE = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_model(folder / "base", attention_dropout=0.1)
    return folder


@pytest.fixture(scope="module", params=["lora", "full"])
def config(request: pytest.FixtureRequest, folder: Path) -> Config:
    """Dropout in both kinds, clipping at every step, and 3 micro-batches a step: 2 workers leave one slot empty."""
    full = request.param == "full"
    return small_config(
        folder,
        full_ft=full,
        max_steps=STEPS,
        save_steps=SAVE,
        eval_steps=SAVE,
        early_stopping_patience=0,
        gradient_accumulation_steps=3,
        nominal_workers=1,
        lora_dropout=0.1,
        max_grad_norm=0.05,
        learning_rate=2e-3,
        max_failures=2,
    )


@pytest.fixture(scope="module")
def undisturbed(config: Config, ray_cluster: None) -> Run:
    return run_of(train(named(config, "undisturbed")))


def named(config: Config, name: str, **settings: Any) -> Config:
    kind = "full" if config.full_ft else "lora"
    return Config.from_dict({**config.to_dict(), "run_name": f"{name}-{kind}", **settings})


def consumed(config: Config) -> list[ledger.Entry]:
    """Every micro-batch of the run, as the order predicts it."""
    order = order_of(config)
    return [(step, index, order.micro_batch(step, index)) for step in range(STEPS) for index in range(3)]


def attempts(run: Run) -> list[dict[str, Any]]:
    return [event for event in lines(run.events_file) if event["kind"] == "attempt"]


def states_of_copies() -> set[Path]:
    """Folders in which attempts found the trainer's state of a copy."""
    return set(Path(tempfile.gettempdir()).glob("manta-copy-*"))


def when_step(run: Run, step: int, act: Callable[[], None]) -> threading.Thread:
    """Call `act` as soon as the log shows `step`."""

    def watch() -> None:
        limit = time.monotonic() + 180
        while time.monotonic() < limit:
            if max((line["step"] for line in lines(run.metrics_file)), default=0) >= step:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_undisturbed_run_clips_and_drops(undisturbed, config):
    """Otherwise the comparisons below would prove less than they say."""
    assert min(logged(undisturbed, "grad_norm").values()) > config.max_grad_norm
    assert ledger.read(undisturbed.ledger, STEPS) == consumed(config)


def test_killed_worker_costs_nothing_but_time(undisturbed, config, record_property):
    """A copy in memory is made after every step, so that a step is done again at most."""
    config = named(config, "killed", step_copies="every")
    run = Run(Path(config.results_dir) / config.run_name)
    left_over = states_of_copies()
    rng = random.Random(f"kill {config.full_ft}")
    step, rank = rng.randrange(SAVE + 2, 2 * SAVE), rng.randrange(2)
    killed: list[float] = []

    def kill() -> None:
        os.kill(attempts(run)[0]["workers"][rank]["pid"], signal.SIGKILL)
        killed.append(time.time())

    watcher = when_step(run, step, kill)
    result = train(config)
    watcher.join()

    assert len(killed) == 1
    assert result["status"] == "finished" and result["steps"] == STEPS
    assert result["attempts"] == 2 and result["world_sizes"] == [2, 2]
    first, second = attempts(run)
    done = max(line["step"] for line in lines(run.metrics_file) if line["attempt"] == 1)
    assert step <= done < STEPS and done - second["step"] <= 1
    assert second["source"] == "copy" and states_of_copies() <= left_over
    assert first["workers"][rank]["pid"] not in [worker["pid"] for worker in second["workers"]]

    assert ledger.read(run.ledger, STEPS) == consumed(config)
    difference = max_difference(weights(run, STEPS), weights(undisturbed, STEPS))
    again = min(line["time"] for line in lines(run.metrics_file) if line["attempt"] == 2)
    record_property("killed_at", f"step {done}, from {second['step']}; Δ {difference}; {again - killed[0]:.1f} s")
    assert difference <= 1e-6


def test_two_workers_then_one_then_two_take_the_same_steps(undisturbed, config, record_property):
    for workers, stop in ((2, 7), (1, 16), (2, None)):
        result = train(named(config, "elastic", num_workers=workers, stop_at_step=stop))
        assert result["status"] == ("stopped" if stop else "finished") and result["steps"] == (stop or STEPS)
    run = run_of(result)
    assert result["world_sizes"] == [2, 1, 2]
    assert [event["step"] for event in attempts(run)] == [0, 7, 16]
    assert ledger.read(run.ledger, STEPS) == consumed(config)
    gaps = {key: max_gap(logged(run, key), logged(undisturbed, key)) for key in ("loss", "eval_loss", "grad_norm")}
    gaps["weights"] = max_difference(weights(run, STEPS), weights(undisturbed, STEPS))
    record_property("gaps", str(gaps))
    assert list(logged(run, "loss")) == list(range(1, STEPS + 1))
    assert gaps["loss"] <= 1e-5 and gaps["eval_loss"] <= 1e-5
    assert logged(run, "learning_rate") == logged(undisturbed, "learning_rate")
    assert logged(run, "epoch") == logged(undisturbed, "epoch")


def test_damaged_checkpoint_and_list_of_ray_are_passed_over(undisturbed, config):
    stopped = train(named(config, "damaged", stop_at_step=2 * SAVE))
    run = run_of(stopped)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [SAVE, 2 * SAVE]
    newest = next((run.path / "checkpoint_00000012" / "model").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-5] ^= 0x40  # inside a weight: the file still loads
    newest.write_bytes(content)
    listed = run.path / "checkpoint_manager_snapshot.json"
    listed.write_bytes(listed.read_bytes()[:200])  # as a full disk leaves it

    result = train(named(config, "damaged"))
    assert result["status"] == "finished"
    assert [event["step"] for event in attempts(run)] == [0, SAVE]
    notes = [event["text"] for event in lines(run.events_file) if event["kind"] == "note"]
    assert len(notes) == 2 and notes[0].startswith("checkpoint_00000012 is put aside:") and newest.name in notes[0]
    assert notes[1] == "Ray's list of checkpoints is made anew from 1 manifests"
    assert run.latest().path.name == f"checkpoint_{STEPS:08d}" and (run.path / "damaged-checkpoint_00000012").is_dir()
    assert ledger.read(run.ledger, STEPS) == consumed(config)
    assert max_difference(weights(run, STEPS), weights(undisturbed, STEPS)) <= 1e-6


def test_other_settings_under_the_same_name_are_refused(undisturbed):
    before = undisturbed.config_file.read_text()
    changed = Config.load(undisturbed.config_file, {"learning_rate": 1e-3, "hf_dataset_config": {"split": "other"}})
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.002 → 0\.001; .*split: 'train' → 'other'.*--run_name"):
        train(changed)
    assert undisturbed.config_file.read_text() == before


def test_other_data_under_the_same_name_is_refused(tmp_path):
    """Edited in place: the settings are the same, and the order of samples would mean others."""
    config = small_config(tmp_path, run_name="edited")
    run = Run(tmp_path / "results" / "edited")
    run.start(config, prepared_of(config).path)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "97: and one more?", "answer": "Yes."}\n')
    with pytest.raises(ConfigError, match="not what it was started with"):
        train(config)


def test_patience_is_counted_over_a_stop(tmp_path):
    """A learning rate near 0 never improves: evaluations at 2, 4, 6, 8, of which the last is the third without."""
    config = small_config(
        tmp_path,
        num_workers=1,
        max_steps=20,
        eval_steps=2,
        learning_rate=1e-12,
        min_learning_rate=0,
        early_stopping_patience=3,
        run_name="patient",
    )
    train(config.model_copy(update={"stop_at_step": 5}))
    result = train(config)
    assert list(logged(run_of(result), "eval_loss")) == [2, 4, 6, 8]
    assert result["steps"] == 8 and result["stopped_early"] is True


def test_same_command_after_the_driver_was_asked_to_end_and_after_it_was_killed(tmp_path):
    """SIGTERM saves and leaves, SIGKILL does not; meanwhile a second driver is refused."""
    config = small_config(tmp_path, num_workers=1, nominal_workers=2, max_steps=240, save_steps=30, eval_steps=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump())
    command = [sys.executable, "-m", "manta", "train", "--config", str(recipe), "--run_name", "driver"]
    run = Run(tmp_path / "results" / "driver")
    family: list[psutil.Process] = []
    parents: list[str] = []
    told: list[str | None] = []  # to glibc when a worker began, and when the raylet did
    refused: list[subprocess.CompletedProcess[str]] = []

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill() -> None:
        refused.append(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60))
        family.extend(psutil.Process(driver.pid).children(recursive=True))
        worker = psutil.Process(attempts(run)[-1]["workers"][0]["pid"])
        parents.append(worker.parent().name())  # type: ignore[union-attr]
        raylet = next(each for each in family if each.name() == "raylet")
        told.extend(each.environ().get(heap.TUNABLES) for each in (worker, raylet))
        driver.kill()

    driver = start()
    try:
        when_step(run, 12, driver.terminate).join()
        assert driver.wait(timeout=60) == ASKED_TO_STOP
        saved = run.latest().step
        assert run.result()["status"] == "stopped" and run.result()["steps"] == saved >= 12
        assert max(line["step"] for line in lines(run.metrics_file) if "loss" in line) == saved  # nothing is wasted

        driver = start()
        when_step(run, saved + 45, kill).join()
        assert driver.wait(timeout=10) == -signal.SIGKILL
    finally:
        driver.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert "raylet" not in parents or sys.platform != "linux" or Path("/dev/nvidiactl").exists()
    if heap.keeps_remainders() and heap.TUNABLES not in os.environ:
        assert told[0] and told[0].startswith("glibc.malloc.tcache_count=0")  # which glibc cuts into its parts
        assert told[1] is None
    assert refused[0].returncode == 2 and "Traceback" not in refused[0].stderr
    assert f"Another driver is training {run.path}: process {driver.pid} on" in refused[0].stderr
    committed = run.latest().step
    assert saved < committed < 240

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    result = run.result()
    assert result["status"] == "finished" and result["steps"] == 240 and result["attempts"] == 3
    assert [attempt["step"] for attempt in attempts(run)] == [0, saved, committed]
    order = order_of(config)
    expected = [(step, index, order.micro_batch(step, index)) for step in range(240) for index in range(4)]
    assert ledger.read(run.ledger, 240) == expected
