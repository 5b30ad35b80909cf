"""The judge of failures, without Ray: what is retried, and how often."""

from __future__ import annotations

import pytest

from manta.attempts import Attempts, Policy

HERE = ("a", "b")


def attempts(**settings) -> Attempts:
    return Attempts(Policy(**{"max_failures": 2, "max_node_losses": 3, "rows": 6, "halve": True, **settings}))


def run(judge: Attempts, start: int, *steps: int) -> str | None:
    """One attempt that gets into the loop and finishes `steps`."""
    stop = judge.begin(start, HERE, HERE)
    judge.entered_loop()
    for step in steps:
        judge.finished(step)
    return stop


def causes(judge: Attempts) -> list[str]:
    return [event["cause"] for event in judge.events if event["kind"] == "failure"]


def test_the_budget_counts_from_the_last_new_checkpoint():
    judge = attempts()
    for number in range(6):  # each fails once, after a new checkpoint
        assert run(judge, 10 * number, 10 * number + 1) is None
        judge.saved(10 * number + 10)
        assert judge.failed(number, "worker", "killed") is None
    run(judge, 60, 62)
    judge.saved(70)
    for step in (73, 72):
        judge.failed(step, "worker", "killed")
        assert run(judge, 70, step) is None
    judge.failed(70, "worker", "killed")
    assert "3 failures since step 70, more than --max_failures 2 allows" in judge.begin(70, HERE, HERE)


def test_a_checkpoint_of_an_old_step_is_no_progress():
    judge = attempts(max_failures=0)
    run(judge, 20, 21)
    judge.saved(20)
    judge.failed(1, "worker", "killed")
    assert "1 failure since step 20" in judge.begin(20, HERE, HERE)


def test_the_same_error_at_the_same_step_ends_the_run_before_another_restart():
    judge = attempts(max_failures=100)
    run(judge, 0, 1, 2)
    assert judge.failed(1, "error", "rank 0: KeyError: 'x'") is None
    run(judge, 0, 1, 2)
    stop = judge.failed(2, "error", "rank 0: KeyError: 'x'")
    assert stop == "Step 3 failed twice, so a restart would only repeat it: rank 0: KeyError: 'x'."
    assert causes(judge) == ["error", "error"]


def test_a_silent_death_at_the_same_step_ends_the_run_at_the_next_start():
    judge = attempts(max_failures=100)
    run(judge, 0, 1, 2)
    judge.failed(1, "worker", "died (process 7)")
    run(judge, 2)
    judge.failed(2, "worker", "died (process 8)")
    assert "Step 3 failed twice" in judge.begin(2, HERE, HERE)


def test_deaths_before_the_loop_are_no_step_and_have_the_budget():
    judge = attempts(max_failures=2)
    run(judge, 0, 1, 2)
    for group in range(2):
        judge.failed(group, "worker", "died")
        assert judge.begin(2, HERE, HERE) is None
    judge.failed(3, "worker", "died")
    assert "3 failures" in judge.begin(2, HERE, HERE)


def test_an_error_while_starting_is_not_tried_a_third_time():
    judge = attempts(max_failures=100)
    judge.begin(0, HERE, HERE)
    assert judge.failed(1, "error", "OSError: no file") is None
    judge.begin(0, HERE, HERE)
    assert "The start of the workers failed twice" in judge.failed(2, "error", "OSError: no file")


def test_workers_that_never_begin_end_the_run():
    judge = attempts()
    assert [judge.failed(group, "worker", "died") for group in (1, 1, 1, 2)] == [None] * 4
    assert "failed 3 times before training began" in judge.failed(3, "worker", "died")


@pytest.mark.parametrize("said", ["worker", "hang", None])
def test_a_lost_node_has_a_budget_of_its_own(said):
    judge = attempts(max_failures=0)
    for group in range(3):
        assert run(judge, 4) is None
        if said:
            judge.failed(group, said, "gone")
        assert judge.begin(4, ("a",), ("a", "c")) is None  # b is not there any more
    run(judge, 4)
    judge.failed(9, "worker", "gone")
    assert "--max_node_losses 3" in judge.begin(4, ("a",), ("a",))
    assert set(causes(judge)) <= {"node", "resize"} and causes(judge).count("node") == 4


def test_a_node_that_is_taken_away_is_a_preemption_also_without_any_error():
    judge = attempts(max_failures=0)
    run(judge, 0, 1)
    judge.preempted(["b"])
    assert judge.begin(1, ("a",), HERE) is None
    assert causes(judge) == ["preemption"]
    judge.failed(2, "error", "ValueError")  # a bug stays one, whatever else goes on
    assert causes(judge) == ["preemption", "error"]


def test_what_a_worker_says_of_itself_wins():
    judge = attempts(max_failures=0)
    run(judge, 0, 1)
    judge.report("preemption", "SIGTERM")
    judge.failed(1, "worker", "died")
    assert judge.begin(1, HERE, HERE) is None
    judge.report("hang", "no progress")
    judge.failed(2, "worker", "died")
    assert "no progress" in judge.begin(1, HERE, HERE)
    assert causes(judge) == ["preemption", "hang"]


def test_more_workers_are_no_failure():
    judge = attempts(max_failures=0, max_node_losses=0)
    for _ in range(5):
        assert run(judge, 0) is None
    assert causes(judge) == ["resize"] * 4


def test_out_of_memory_divides_micro_batches_down_to_one_row():
    judge = attempts(max_failures=0)
    splits = []
    for group in range(2):
        run(judge, 0)
        judge.report("out_of_memory", "rank 0")
        assert judge.failed(group, "error", "OutOfMemoryError") is None
        splits.append(judge.split)
    assert splits == [2, 6]  # 6 rows, then 3, then 1
    run(judge, 0)
    judge.report("out_of_memory", "rank 0")
    assert "1 row per micro-batch" in judge.failed(9, "error", "OutOfMemoryError")


def test_out_of_memory_stops_where_that_is_wanted():
    judge = attempts(halve=False)
    run(judge, 0)
    judge.report("out_of_memory", "rank 0")
    assert "--out_of_memory halve" in judge.failed(1, "error", "OutOfMemoryError")
