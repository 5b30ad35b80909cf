"""Workers that are asked to leave, hang, run out of memory, or fail again and again: what is retried, at what loss."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from manta import ledger
from manta.config import Config
from manta.errors import TrainingError
from manta.runs import Run
from manta.train import train
from running import lines, logged, max_difference, max_gap, order_of, run_of, small_config, weights
from tiny import tiny_model
from troubleshooting import check

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STEPS = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("supervision")
    return small_config(folder, max_steps=STEPS, save_steps=100, eval_steps=0, lora_dropout=0.0, max_failures=0)


@pytest.fixture(scope="module")
def undisturbed(config: Config, ray_cluster: None) -> Run:
    return run_of(train(named(config, "undisturbed")))


def named(config: Config, name: str, **settings: Any) -> Config:
    return Config.from_dict({**config.to_dict(), "run_name": name, **settings})


def folder_of(config: Config) -> Run:
    return Run(Path(config.results_dir) / str(config.run_name))


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run.events_file) if event["kind"] == kind]


def when(condition: Callable[[], Any], act: Callable[[], None]) -> threading.Thread:
    """Call `act` as soon as `condition` holds."""

    def watch() -> None:
        limit = time.monotonic() + 120
        while time.monotonic() < limit and not condition():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def signal_at_step(run: Run, step: int, rank: int, number: int) -> threading.Thread:
    return when(
        lambda: max((line["step"] for line in lines(run.metrics_file)), default=0) >= step,
        lambda: os.kill(events(run, "attempt")[0]["workers"][rank]["pid"], number),
    )


def consumed(config: Config) -> list[ledger.Entry]:
    order = order_of(config)
    return [(step, index, order.micro_batch(step, index)) for step in range(STEPS) for index in range(4)]


def assert_as_undisturbed(config: Config, run: Run, undisturbed: Run) -> None:
    assert ledger.read(run.ledger, STEPS) == consumed(config)
    assert max_difference(weights(run, STEPS), weights(undisturbed, STEPS)) <= 1e-6


@pytest.mark.parametrize("rank", [0, 1])
def test_worker_that_is_asked_to_leave_saves_first(config, undisturbed, rank):
    """No save is due before the end, and no failure is allowed: a preemption has a budget of its own."""
    config = named(config, f"sigterm-{rank}")
    run = folder_of(config)
    signal_at_step(run, 5, rank, signal.SIGTERM)
    result = train(config)
    assert result["status"] == "finished" and result["attempts"] == 2
    first, second = events(run, "attempt")
    (failure,) = events(run, "failure")
    assert failure["cause"] == "preemption" and f"rank {rank} was asked to leave" in failure["text"]
    done = max(line["step"] for line in lines(run.metrics_file) if line["attempt"] == 1 and "loss" in line)
    assert 5 <= second["step"] <= done < STEPS  # while the checkpoint is written, steps go on
    assert first["workers"][rank]["pid"] not in [worker["pid"] for worker in second["workers"]]
    assert_as_undisturbed(config, run, undisturbed)


def test_frozen_worker_is_ended_by_the_watchdogs_of_the_others(config, undisturbed):
    config = named(config, "frozen", step_timeout_s=5, save_steps=2, max_failures=1)
    run = folder_of(config)
    frozen: list[float] = []
    signal_at_step(run, 5, 1, signal.SIGSTOP)
    when(lambda: events(run, "attempt")[1:], lambda: frozen.append(time.time()))
    result = train(config)
    assert result["status"] == "finished" and result["attempts"] == 2
    (failure,) = events(run, "failure")
    assert failure["cause"] == "hang" and "rank 0 made no progress" in failure["text"]
    log = (run.logs / "worker-00000.log").read_text()
    stacks = log[log.index("no progress for") :]
    assert "Thread" in stacks and "_inner_training_loop" in stacks
    pid = events(run, "attempt")[0]["workers"][1]["pid"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert_as_undisturbed(config, run, undisturbed)


def test_an_error_that_repeats_at_its_step_stops_the_second_time(tmp_path):
    """A row holds a token that the model has no embedding for."""
    from transformers import AutoTokenizer

    tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["~~"])
    tokenizer.save_pretrained(tmp_path / "base")
    config = small_config(
        tmp_path,
        run_name="broken",
        eval_steps=0,
        save_steps=1,
        max_failures=100,
        step_timeout_s=60,
        data={"train_split_ratio": 1.0},
    )
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[17] = rows[17].replace("the capital", "the ~~ capital")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(TrainingError) as caught:
        train(config)
    run = folder_of(config)
    assert re.search(r"Step \d+ failed twice, .*IndexError", str(caught.value))
    check("A token is beyond the model's vocabulary", str(caught.value))
    assert [failure["cause"] for failure in events(run, "failure")] == ["error", "error"]
    assert run.result()["attempts"] == 2 and run.result()["failure"] in str(caught.value)


def test_out_of_memory_goes_on_with_smaller_micro_batches(tmp_path, record_property):
    """The limit is that of the process: a micro-batch of 8 rows does not fit below it, one of 4 does."""
    tiny_model(tmp_path / "base", vocab_size=60_000)
    long = "Yes, and it is so because of what was said before. " * 12
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(f'{{"question": "{number}?", "answer": "{long}"}}\n' for number in range(96))
    config = small_config(
        tmp_path,
        run_name="short",
        max_steps=8,
        eval_steps=0,
        save_steps=2,
        num_workers=1,
        nominal_workers=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        lora_dropout=0.0,
        fused_loss="off",  # logits of all rows at once, so that memory grows with the micro-batch
        max_failures=0,
    )
    run, limit = folder_of(config), []
    threading.Thread(target=limit_memory, args=(run, limit), daemon=True).start()
    result = train(config)
    record_property("limit", str(limit))
    assert result["status"] == "finished" and result["attempts"] == 2
    (failure,) = events(run, "failure")
    assert failure["cause"] == "out_of_memory"
    assert [attempt["split"] for attempt in events(run, "attempt")] == [1, 2]
    assert any("4 rows from here on, not 8" in note["text"] for note in events(run, "note"))
    assert [setup["sharding_strategy"] for setup in events(run, "setup")] == ["NO_SHARD", "FULL_SHARD"]

    smaller = named(config, "smaller", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    other = run_of(train(smaller))
    assert max_gap(logged(run, "loss"), logged(other, "loss")) <= 1e-5
    assert samples(run) == samples(other)


def samples(run: Run) -> list[tuple[int, int]]:
    """What each step consumed, however it was divided into micro-batches."""
    return sorted((step, row) for step, _, rows in ledger.read(run.ledger, 8) for row in rows)


def limit_memory(run: Run, limit: list[int]) -> None:
    """Watch the first attempt's two steps, then allow it and all later ones three quarters of what a step needed."""
    limited: set[int] = set()
    least, most = 1 << 60, 0
    while not run.result_file.exists():
        time.sleep(0.002)
        for attempt in events(run, "attempt"):
            pid = attempt["workers"][0]["pid"]
            done = max((line["step"] for line in lines(run.metrics_file)), default=0)
            if pid in limited or not psutil.pid_exists(pid):
                continue
            if not limit and done >= 1:
                used = data_of(pid)
                least, most = min(least, used), max(most, used)
            if not limit and done >= 3:
                limit.append(least + 3 * (most - least) // 4)
            if limit:
                psutil.Process(pid).rlimit(psutil.RLIMIT_DATA, (limit[0], resource.RLIM_INFINITY))
                limited.add(pid)


def data_of(pid: int) -> int:
    """Bytes that RLIMIT_DATA counts."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmData:\s+(\d+) kB", text).group(1)) * 1024
