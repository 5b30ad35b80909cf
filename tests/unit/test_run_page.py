"""A run's page and comparison from folders made by hand: whole, just begun, torn, damaged, very long."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from manta import compare, facts, manifest, plots, record, run_page
from manta.cli import main
from manta.config import Config
from manta.errors import UserError
from manta.lease import Lease
from manta.runs import METRIC, Run

SECRET = "hf_AbCd<1234>efgh5678"
BEGAN = 1_700_000_000.0


def add(path: Path, *values: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def attempt(number: int, at: float, step: int = 0, workers: int = 2) -> dict[str, Any]:
    return {"time": BEGAN + at, "kind": "attempt", "attempt": number, "world_size": workers, "step": step}


def failure(number: int, at: float, step: int, text: str = "a worker was killed") -> dict[str, Any]:
    return {"time": BEGAN + at, "kind": "failure", "attempt": number, "step": step, "cause": "worker", "text": text}


def log(number: int, at: float, step: int, **values: float) -> dict[str, Any]:
    return {"time": BEGAN + at, "kind": "log", "attempt": number, "step": step, **values}


def begun(folder: Path, name: str = "a-run", **settings: Any) -> Run:
    """A run whose driver has written its settings, and nothing else yet."""
    run = Run(folder / name)
    prepared = folder / "prepared" / "0123456789abcdef"
    if not prepared.exists():
        counts = {
            "training": {"rows": 90, "samples": 80, "tokens": 4000, "trained_tokens": 1000, "sequences": 80},
            "validation": {"rows": 10, "samples": 10, "tokens": 500, "trained_tokens": 125},
            "test": {"rows": 10},
        }
        counts |= {"noted": {"too long": {"rows": 10, "first": [3]}}, "rows": 110, "quarantined": 2}
        sources = [{"name": "rows.jsonl", "format": "template", "columns": ["q", "a"]}]
        prepared.mkdir(parents=True)
        manifest.close(prepared, {}, {"kind": "prepared data", "counts": counts, "sources": sources, "model": "a"})
    config = Config(hf_model_id="a-model", results_dir=str(folder), run_name=name, learning_rate=0.001, max_steps=40)
    run.start(Config.from_dict(config.to_dict() | settings), prepared)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """40 steps, a worker killed at step 25, which went on from step 20, and a second driver from step 30 on."""
    run = begun(tmp_path)
    setup = {"time": BEGAN + 1, "kind": "setup", "text": "bfloat16, sdpa attention", "dtype": "bfloat16"}
    setup |= {"attention": "sdpa", "layout": "joined", "gradient_checkpointing": "none", "versions": {"torch": "2.13"}}
    add(run.events_file, attempt(1, 0), setup, failure(1, 60, 25), attempt(2, 60, step=20, workers=1))
    add(run.events_file, attempt(3, 10_000, step=30))
    for number, first, last, at in ((1, 1, 25, 0), (2, 21, 30, 60), (3, 31, 40, 10_000)):
        for step in range(first, last + 1):
            passed = step - first + 1
            values = {"loss": 2.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 100 * passed}
            add(run.metrics_file, log(number, at + passed, step, peak_memory_bytes=3 << 30, **values))
    add(run.metrics_file, log(1, 20, 20, eval_loss=0.5), log(3, 10_010, 40, eval_loss=0.4))
    for step, loss in ((20, 0.5), (40, 0.4)):
        folder = run.path / f"checkpoint_{step:08d}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"w" * 2048)
        manifest.close(folder, manifest.digests(folder), {"step": step, "metrics": {METRIC: loss}})
    seconds = {"check": 1.0, "ray": 2.0, "prepare": 0.5, "fit": 30.0, "until_first_step": 10.0, "total": 35.0}
    result = {"status": "finished", "failure": None, "steps": 40, "max_steps": 40, "stopped_early": False}
    result |= {"epoch": 2.0, "tokens": 4500, "tokens_per_second": 100.0, "skipped_steps": 0, "manta": "0.1.0"}
    manifest.write_json(run.result_file, result | {"seconds": seconds})
    return run


class Parsed(HTMLParser):
    """What a page holds, by tags: every id once, every open tag closed, no address of another place."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        self.ids += [about["id"] or ""] if "id" in about else []
        for name in ("src", "href", "xlink:href"):
            assert not re.match(r"https?:|//", about.get(name) or ""), about
        if tag not in ("meta", "br", "input", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def __contains__(self, text: str) -> bool:
        return text in " ".join(" ".join(self.text).split())


def page_of(run: Run) -> Parsed:
    return Parsed(run_page.write(run).read_text(encoding="utf-8"))


def test_figures_of_a_run_with_a_killed_worker_and_a_second_driver(run):
    it = record.read(run)
    assert it.problems == []
    assert [(each.first_step, each.last_step, each.workers) for each in it.attempts] == [
        (0, 25, 2),
        (20, 30, 1),
        (30, 40, 2),
    ]
    assert it.series("loss")[23] == 2.0 / 23 and len(it.series("loss")) == 40  # steps done again count once
    assert set(it.speed().values()) == {100.0} and it.speed().keys().isdisjoint({1, 31})
    assert it.wall_s == 60 + 10 + 10  # the pause between the drivers is not in it
    assert it.best.step == 40 and it.best_value == 0.4
    told = facts.figures(it)
    assert told["restarts"] == "2 (1 × worker, 1 × resumed)"
    assert told["best eval_loss"] == "0.4000 at step 40" and told["tokens/s"] == "100"
    assert told["peak memory of a worker"] == "3.0 GiB" and told["wall time"] == "1 min 20 s"
    assert set(it.changed) == {"hf_model_id", "learning_rate", "max_steps", "results_dir", "run_name"}


def test_the_page_says_it_all(run):
    page = page_of(run)
    for text in (
        "finished after step 40 of 40",
        "dtype bfloat16 , attention sdpa",
        "worker: a worker was killed",
        "ended after step 25: worker: a worker was killed",
        "checkpoint_00000040 40 0.4000 2.0 KiB best, newest",
        "too long 10 rows, bad row 2 rows",
        "25.0% 25.0%",  # trained shares
        "settings (fingerprint)",
        "0123456789abcdef",
        "torch 2.13",
        "to the end of the first step 13.5 s",
        "the other steps, evaluations, saves 20.0 s",
        f"manta train --config {run.path}/config.yaml --run_name a-run-again",
        f"manta convert --run {run.path}",
        f"manta evaluate --run {run.path}",
        f"manta serve --run {run.path}",
    ):
        assert text in page, text
    assert "manta train --resume" not in page  # it is finished
    text = run.page.read_text()
    assert re.search(r'<tr class="changed"><td class="name">learning_rate</td>.*0\.001.*5e-05', text)
    assert '<tr><td class="name">weight_decay' in text
    assert text.count("<svg") == 5  # four curves and the timeline; there are no answers


def test_lengths_are_left_out_where_only_the_counts_are_there(run):
    assert "lengths" not in record.read(run).data["splits"]["training"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    run = begun(tmp_path)
    with Lease(run):
        page = page_of(run)
        assert "running after step 0 of 40, by process" in page and "Nothing is logged yet." in page
        assert "No worker has begun." in page and "None is complete yet." in page
        assert "write this page anew" in page and "manta convert" not in page
    page = page_of(run)
    assert "interrupted" in page and f"manta train --resume {run.path}" in page


def test_a_run_that_failed_says_why_first(run):
    why = "Step 26 failed twice, so a restart would only repeat it: boom."
    manifest.write_json(run.result_file, (run.result() or {}) | {"status": "failed", "failure": why, "steps": 20})
    page = page_of(run)
    assert f"failed after step 20 of 40 Curves What happened Checkpoints Data Settings Lineage Commands {why}" in page
    assert f"manta train --resume {run.path}" in page


def test_time_to_the_first_step_is_broken_down_where_it_is_known():
    whole = {"check": 1.0, "ray": 2.0, "fit": 30.0, "until_first_step": 10.0}
    assert [seconds for _, seconds in facts.until_first_step(whole)] == [1.0, 2.0, 10.0]
    parts = {"start_workers": 4.0, "imports": 3.0, "model": 2.0, "first_step": 1.0}
    assert [seconds for _, seconds in facts.until_first_step(whole | parts)] == [1.0, 2.0, 4.0, 3.0, 2.0, 1.0]
    assert facts.after_first_step(whole) == 20.0 and facts.after_first_step({}) is None
    assert facts.until_first_step({}) == []


def test_torn_and_missing_files_are_named_or_left_out(run):
    for file in (run.metrics_file, run.events_file):
        with file.open("a") as lines:
            lines.write('{"time": 1700010020.0, "kind": "log", "st')
    whole = record.read(run)
    assert whole.steps == 40 and whole.problems == []
    (run.path / "checkpoint_00000020" / "manifest.json").write_text("{")
    run.result_file.write_text("[")
    for path in (run.path.parent / "prepared").rglob("manifest.json"):
        path.unlink()
    page = page_of(run)
    assert "interrupted after step 40" in page and "The prepared data is not there." in page
    assert "the prepared data:" in page and "checkpoint_00000020" in page and "unfinished or damaged" in page
    run.config_file.write_text("max_steps: [")
    assert "config.yaml:" in page_of(run)
    run.config_file.write_text("max_steps: 40\na_setting_of_tomorrow: 7\n")
    page = page_of(run)
    assert "a_setting_of_tomorrow" in page and "unknown to this version of Manta" in page


def test_lines_of_other_kinds_than_expected_are_no_error(run):
    add(run.events_file, {"time": BEGAN}, {"kind": "failure", "time": BEGAN}, {"time": BEGAN, "kind": "of tomorrow"})
    add(run.metrics_file, {"loss": 1.0}, log(9, 11_000, 41, loss=0.1))
    assert "finished after step 40" in page_of(run)


def test_values_that_are_not_finite_are_crosses_and_no_error(run):
    add(run.metrics_file, log(3, 10_011, 41, loss=math.nan), log(3, 10_012, 42, loss=math.inf, grad_norm=-math.inf))
    text = run_page.write(run).read_text()
    assert "not finite" in text and "nan" not in "".join(re.findall(r' d="[^"]*"', text)).lower()
    only = plots.curves({"loss": {1: math.nan}}, "loss", "nothing finite")
    assert "not finite" in only


def test_a_page_of_a_long_run_is_small_and_keeps_its_spikes(tmp_path):
    run = begun(tmp_path)
    add(run.events_file, attempt(1, 0), *(failure(number, 10 * number, number) for number in range(1, 3000)))
    spike = 77_777
    loss = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "eval_loss": 1.0}
    lines = (json.dumps(log(1, step, step, tokens=9 * step, **loss)) for step in range(1, 100_001) if step != spike)
    run.metrics_file.write_text("\n".join(lines) + "\n")
    add(run.metrics_file, log(1, spike, spike, loss=50.0))
    it = record.read(run)
    page = run_page.page(it)
    assert len(page) < 1_000_000
    assert "more in events.jsonl" in Parsed(page)
    thin = plots.thinned(it.series("loss"))
    assert len(thin) <= plots.MOST_POINTS and thin[spike] == 50.0 and {1, 100_000} <= thin.keys()


def test_thinning_leaves_short_series_as_they_are():
    assert plots.thinned({3: 1.0, 1: 2.0}) == {1: 2.0, 3: 1.0}


def test_no_secret_gets_onto_a_page(run, monkeypatch, capsys):
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    text = f"GET https://me:{SECRET}@hub/x?y={SECRET} and s3://user:pass-word@bucket/key"
    add(run.events_file, failure(3, 10_020, 40, text), {"time": BEGAN, "kind": "note", "text": SECRET})
    written = run_page.write(run).read_text()
    other = begun(run.path.parent, "other", optim=SECRET)
    result = CliRunner().invoke(
        main, ["runs", "compare", str(run.path), str(other.path), "--html", str(run.path / "c")]
    )
    assert result.exit_code == 0, result.output
    for shown in (written, result.output, (run.path / "c").read_text()):
        assert "AbCd" not in shown and "pass-word" not in shown
    assert "[SOME_TOKEN]" in written and "[SOME_TOKEN]" in result.output


def test_a_page_that_cannot_be_written_is_no_failure_of_the_run(run, capsys):
    run.page.mkdir()  # so that nothing can be put in its place
    with run_page.left_behind(run.config()):
        pass
    assert "no page of the run: " in capsys.readouterr().err
    done = CliRunner().invoke(main, ["report", "--run", str(run.path)])
    assert done.exit_code == 2 and "cannot be written" in done.output and "--html" in done.output
    elsewhere = run.path.parent / "pages" / "one.html"
    done = CliRunner().invoke(main, ["report", "--run", str(run.path), "--html", str(elsewhere)])
    assert done.exit_code == 0 and done.output.strip() == str(elsewhere) and "finished" in page_text(elsewhere)


def page_text(path: Path) -> str:
    return " ".join(Parsed(path.read_text(encoding="utf-8")).text)


def test_a_run_that_failed_leaves_a_page_too_and_one_that_was_refused_does_not(run):
    with pytest.raises(RuntimeError), run_page.left_behind(run.config()):
        raise RuntimeError("out of luck")
    assert run.page.exists()
    run.page.unlink()
    with pytest.raises(UserError), run_page.left_behind(run.config()):
        raise UserError("another driver has it")
    assert not run.page.exists()
    never = Config(results_dir=str(run.path.parent / "nowhere"))
    with pytest.raises(KeyboardInterrupt), run_page.left_behind(never):
        raise KeyboardInterrupt
    assert not (run.path.parent / "nowhere").exists()


def test_a_page_is_replaced_whole(run):
    run_page.write(run)
    run_page.write(run)
    assert [path.name for path in run.path.glob("*report*")] == ["report.html"]


def test_runs_beside_each_other(run):
    other = begun(run.path.parent, "other", learning_rate=0.01)
    add(other.events_file, attempt(1, 0))
    add(other.metrics_file, *(log(1, step, step, loss=1.0, tokens=50 * step) for step in range(1, 9)))
    found = compare.compare([str(run.path), str(other.path)])
    assert found.settings == {"learning_rate": ["0.001", "0.01"]}
    assert found.outcome["state"] == ["finished", "interrupted"] and found.outcome["steps"] == ["40", "8"]
    assert found.outcome["tokens/s"] == ["100", "50"] and found.best["tokens/s"] == [0]
    assert "best eval_loss" not in found.best  # only one has it
    assert found.data["training samples"] == ["80", "80"] and found.same_data

    page = run.path.parent / "compared.html"
    done = CliRunner().invoke(main, ["runs", "compare", str(run.path), str(other.path), "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert re.search(r"learning_rate +0\.001 +0\.01", done.output) and re.search(r"tokens/s +100 \* +50", done.output)
    parsed = Parsed(page.read_text())
    assert "Settings that differ" in parsed and "learning_rate 0.001 0.01" in parsed and "other" in parsed
    assert page.read_text().count("<svg") == 5


def test_what_cannot_be_compared_is_a_message(run, tmp_path):
    def refused(*names: object) -> str:
        done = CliRunner().invoke(main, ["runs", "compare", *map(str, names)])
        assert done.exit_code == 2, done.output
        return done.output

    assert "1 run cannot be compared" in refused(run.path)
    assert "7 runs cannot be compared" in refused(*[run.path] * 7)
    assert "named twice" in refused(run.path, run.path)
    assert "is not a run" in refused(run.path, tmp_path)


def test_runs_of_the_same_name_are_told_apart_by_their_folders(run, tmp_path):
    other = begun(tmp_path / "elsewhere")
    found = compare.compare([str(run.path), str(other.path)])
    assert found.names == [f"{tmp_path.name}/a-run", "elsewhere/a-run"]


def test_the_page_of_a_run_on_a_store_is_beside_it(tmp_path):
    from manta import storage

    place = storage.place("memory://runs-of-a-page/one")
    run = Run(place)
    run.start(Config(hf_model_id="a-model", results_dir="memory://runs-of-a-page"), tmp_path / "gone")
    run.events_file.write_text(json.dumps(attempt(1, 0)) + "\n")
    run.metrics_file.write_text("".join(json.dumps(log(1, step, step, loss=1.0)) + "\n" for step in range(1, 5)))
    done = CliRunner().invoke(main, ["report", "--run", "memory://runs-of-a-page/one"])
    assert done.exit_code == 0 and done.output.strip() == "memory://runs-of-a-page/one/report.html", done.output
    page = Parsed(manifest.read_text(run.page))
    assert "interrupted after step 4" in page and "manta train --resume memory://runs-of-a-page/one" in page
