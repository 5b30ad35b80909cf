import json

import pytest

from manta.progress import Display
from manta.runs import METRIC, Run
from manta.status import Status


def heard(status, *messages):
    for message in messages:
        status.take(message)
    return status


def step(number, time, tokens=100):
    return {"kind": "step", "step": number, "time": time, "rank": 0, "tokens": tokens}


def attempt(number, start, workers=2, time=0.0):
    return {"kind": "attempt", "attempt": number, "step": start, "world_size": workers, "time": time}


def test_two_ranks_do_one_step():
    status = Status("a", max_steps=10)
    heard(
        status, attempt(1, 0), step(1, 10.0), step(1, 10.001), step(2, 12.0), step(2, 12.1), step(3, 14.0), step(3, 14)
    )
    assert (status.step, status.tokens, status.state) == (3, 600, "training")
    assert status.tokens_per_second == pytest.approx(100)  # 400 tokens between steps 1 and 3, which are 4 s apart
    assert status.eta_s == pytest.approx(14)  # 7 steps of 2 s


def test_one_step_says_nothing_about_the_speed():
    status = heard(Status("a", max_steps=10), attempt(1, 0), step(1, 10.0), step(1, 10.001))
    assert status.tokens_per_second is None and status.eta_s is None


def test_the_speed_is_that_of_the_last_half_minute_however_long_a_step_takes():
    status = heard(Status("a", max_steps=100), attempt(1, 0), *(step(n, n * 1.0) for n in range(1, 41)))
    assert status.eta_s == pytest.approx(60)
    heard(status, *(step(40 + n, 40 + n * 0.5) for n in range(1, 61)))
    assert status.tokens_per_second == pytest.approx(200)
    slow = heard(Status("a", max_steps=5), attempt(1, 0), step(1, 0.0), step(2, 300.0), step(3, 500.0))
    assert slow.tokens_per_second == pytest.approx(0.5) and slow.eta_s == pytest.approx(400)


def test_a_restart_sets_the_step_back_and_is_no_step_of_its_own():
    status = heard(Status("a", max_steps=10), attempt(1, 0), *(step(n, n * 1.0) for n in range(1, 7)))
    failure = {"kind": "failure", "attempt": 1, "step": 6, "cause": "worker", "text": "gone", "time": 7.0}
    heard(status, failure)
    assert (status.state, status.step, status.tokens_per_second) == ("restarting", 6, None)
    heard(status, attempt(2, 4, workers=1, time=60.0))
    assert (status.state, status.step, status.restarts, status.attempt, status.workers) == ("starting", 4, 1, 2, 1)
    heard(status, step(5, 70.0), step(6, 71.0))
    assert (status.step, status.tokens_per_second, status.eta_s) == (6, pytest.approx(100), pytest.approx(4))


def test_the_first_attempt_of_a_driver_is_no_restart():
    assert heard(Status("a"), attempt(7, 40)).restarts == 0


def test_figures_stay_until_there_are_newer_ones():
    log = {"kind": "log", "step": 1, "time": 1.0, "attempt": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 3.0}
    answers = {"kind": "validation", "checkpoint": "c", "step": 1, "time": 2.0, "exact_match": 0.5, "rows": 8}
    saved = {"kind": "checkpoint", "step": 1, "attempt": 1, "time": 3.0}
    status = heard(Status("a"), log, {"kind": "log", "step": 1, "time": 2.0, METRIC: 1.5}, answers, saved)
    assert (status.loss, status.learning_rate, status.grad_norm, status.eval_loss) == (2.0, 0.1, 3.0, 1.5)
    assert status.answers == {"exact_match": 0.5}
    assert (status.checkpoint_step, status.checkpoint_time) == (1, 3.0)


def test_it_is_read_back_as_it_was_written():
    status = heard(Status("a", max_steps=10), attempt(1, 0), step(1, 1.0), step(2, 2.0))
    written = json.loads(json.dumps(status.as_dict()))
    assert Status.load({**written, "of_a_later_version": 1}).as_dict() == status.as_dict()


def test_the_display_says_each_thing_once(capsys):
    """What a new attempt is set up with, and why the workers ended, which is known at once and judged later."""
    display = Display("train", Status("a", max_steps=10))
    setup = {"kind": "setup", "text": "float32, sdpa attention"}
    failure = {"kind": "failure", "attempt": 1, "step": 3, "cause": "worker", "text": "rank 1 died"}
    for event in (setup, {"kind": "restart", "text": "rank 1 died"}, failure, attempt(2, 3), setup, failure):
        display.tell(event)
    display.tell({**setup, "text": "bfloat16, sdpa attention"})
    assert capsys.readouterr().err.splitlines() == [
        "train: float32, sdpa attention",
        "train: the workers ended: rank 1 died",
        "train: attempt 2 goes on from step 3",
        "train: attempt 1 ended, worker: rank 1 died",
        "train: bfloat16, sdpa attention",
    ]


def test_how_a_run_ended_before_is_gone_once_it_goes_on(tmp_path):
    from manta.config import Config

    run = Run(tmp_path / "a")
    run.start(Config(), tmp_path / "data")
    run.result_file.write_text('{"status": "stopped"}')
    run.progress_file.write_text('{"step": 3}')
    run.start(Config(), tmp_path / "data")
    assert run.result() is None and not run.progress_file.exists()
