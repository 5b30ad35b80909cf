"""Base against tuned: figures, the page, and an evaluation that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from browser import browser, needs_browser, open_file
from faults.job import kill_marked, marks
from manta.errors import UserError
from manta.evaluate import Sampling, Scoring, evaluate
from manta.runs import Run
from manta.train import train
from running import lines, run_of, small_config

pytestmark = pytest.mark.slow
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def lora(demo: Any, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Run:
    """A copy of the demo's run, which has learned its task."""
    return Run(Path(shutil.copytree(demo.folder / "demo/results/tune", tmp_path_factory.mktemp("evaluate") / "tune")))


def test_base_and_checkpoints_on_the_runs_own_test_split(lora):
    report = evaluate(lora, checkpoints=("best", "latest"), sampling=GREEDY, max_samples=20, batch_size=8)
    assert list(report["models"]) == ["base", "tuned", lora.latest().path.name]
    base, tuned = report["models"]["base"], report["models"]["tuned"]
    assert tuned["loss"] < base["loss"] / 4
    assert tuned["intervals"]["loss"][0] < tuned["loss"] < tuned["intervals"]["loss"][1]
    rows = lines(lora.path / "evaluation" / "predictions.jsonl")
    held_out = lines(lora.prepared() / "test.jsonl")
    assert [row["row"] for row in rows] == [row["row"] for row in held_out][:20]
    hits = sum(row["tuned"].strip() == row["output"].strip() for row in rows)
    assert tuned["exact_match"] == hits / len(rows) > base["exact_match"] + 0.3
    rouge = sum(row["scores"]["tuned"]["rougeL"] for row in rows) / len(rows)
    assert tuned["rougeL"] == pytest.approx(rouge, abs=1e-4) and tuned["rougeL"] > base["rougeL"]
    gain = report["gains"]["tuned"]["exact_match"]
    assert gain["mean"] == pytest.approx(tuned["exact_match"] - base["exact_match"])
    assert 0 < gain["interval"][0] <= gain["mean"] <= gain["interval"][1]
    assert json.loads((lora.path / "evaluation" / "metrics.json").read_text()) == report


def test_a_run_that_trained_every_weight(tmp_path, ray_cluster):
    run = run_of(train(small_config(tmp_path, full_ft=True, max_steps=30, eval_steps=10, save_steps=10)))
    report = evaluate(run, sampling=GREEDY, max_samples=5, batch_size=2)
    base, tuned = report["models"]["base"], report["models"]["tuned"]
    assert tuned["loss"] < base["loss"] - 0.5
    assert {row["row"] for row in lines(run.path / "evaluation" / "predictions.jsonl")} == {
        row["row"] for row in lines(run.prepared() / "test.jsonl")[:5]
    }


def test_scores_do_not_depend_on_the_batch_size(lora):
    reports = [evaluate(lora, sampling=GREEDY, max_samples=6, batch_size=size) for size in (1, 6)]
    ours, theirs = (report["models"]["tuned"] for report in reports)
    assert {name: ours[name] for name in ("loss", "exact_match", "bleu")} == pytest.approx(
        {name: theirs[name] for name in ("loss", "exact_match", "bleu")}, abs=1e-5
    )


def test_nothing_to_score_is_a_message(lora, tmp_path):
    with pytest.raises(UserError, match="no test data"):
        evaluate(lora, tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="holds no rows"):
        evaluate(lora, tmp_path / "empty.jsonl")
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="input"):
        evaluate(lora, tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="no checkpoint 7"):
        evaluate(lora, checkpoints=("7",))
    with pytest.raises(UserError, match="no text encoder"):
        evaluate(lora, scoring=Scoring(bertscore_model=str(tmp_path)))


def test_overlong_prompts_and_empty_answers_are_counted(lora, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"input": "word " * 5000, "output": "x"}, {"input": "", "output": "y"}, {"input": "Q", "output": "A"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate(lora, path, sampling=Sampling(max_tokens=4, temperature=0))
    assert report["too_long"] == 2
    assert report["models"]["tuned"]["empty"] >= 2
    assert [row["tuned"] == "" for row in lines(lora.path / "evaluation" / "predictions.jsonl")][:2] == [True, True]


def test_a_killed_evaluation_goes_on_with_the_answers_that_are_there(lora, tmp_path):
    """Drawn answers, too: they do not depend on where the kill came."""
    kept = lora.path / "evaluation" / "answers"
    before = set(kept.glob("*.jsonl"))
    command = [sys.executable, "-m", "manta", "evaluate", "--run", str(lora.path), "--batch_size", "1"]
    command += ["--max_tokens", "40", "--temperature", "0.9", "--max_samples", "12", "--bertscore_model", "off"]
    mark = f"killed-{os.getpid()}"
    with (tmp_path / "out").open("wb") as output:
        driver = subprocess.Popen(command, env={**os.environ, **marks(mark)}, stdout=output, stderr=output)
    try:
        limit = time.monotonic() + 120
        while not (new := [file for file in kept.glob("*.jsonl") if file not in before and len(lines(file)) >= 3]):
            assert time.monotonic() < limit and driver.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    finally:
        kill_marked(mark)
        driver.wait(30)
    there = lines(new[0])
    assert 3 <= len(there) < 12
    drawn = Sampling(max_tokens=40, temperature=0.9)
    arguments: dict[str, Any] = {"sampling": drawn, "max_samples": 12, "scoring": Scoring(bertscore_model="off")}
    resumed = evaluate(lora, batch_size=1, **arguments)
    assert lines(new[0])[: len(there)] == there and len(lines(new[0])) == 12
    texts = [row["tuned"] for row in lines(lora.path / "evaluation" / "predictions.jsonl")]
    for file in kept.glob("*.jsonl"):
        file.unlink()
    assert evaluate(lora, batch_size=1, **arguments) == resumed
    assert [row["tuned"] for row in lines(lora.path / "evaluation" / "predictions.jsonl")] == texts


@needs_browser
def test_the_page_in_a_browser(lora, tmp_path):
    path = tmp_path / "rows.jsonl"
    held_out = lines(lora.prepared() / "test.jsonl")[:30]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*held_out, {"input": "<b>&", "output": "</script>"}]))
    report = evaluate(lora, path, sampling=Sampling(max_tokens=40, temperature=0))
    right = round(report["models"]["tuned"]["exact_match"] * report["rows"])
    assert 0 < right < report["rows"] and report["models"]["base"]["exact_match"] == 0
    with browser() as driver:
        open_file(driver, lora.path / "evaluation" / "report.html")
        articles = driver.find_elements("tag name", "article")
        assert len(articles) == report["rows"]
        table = driver.find_element("id", "metrics").text
        assert f"{report['models']['tuned']['loss']:.4f}" in table and "exact match" in table
        assert driver.find_element("css selector", "svg[aria-label^=Loss]").rect["height"] > 100
        driver.find_element("css selector", "#which option[value='won tuned']").click()
        assert sum(article.is_displayed() for article in articles) == right
        driver.find_element("css selector", "#which option[value='']").click()
        driver.find_element("id", "find").send_keys("</script>")
        assert [article.is_displayed() for article in articles] == [False] * len(held_out) + [True]
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
