"""The Python API, as far as it needs no run: names, types, results. The rest is in the notebook's tests."""

import importlib
import inspect
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import manta
from manta.results import Evaluation, Gain, TrainResult
from manta.signals import stopping_on_sigterm, was_interrupted

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "MYPYPATH": str(ROOT / "src")}
STAGES = ("prepare", "train", "evaluate", "convert")
RESULT = {
    "status": "stopped",
    "failure": None,
    "run": "/runs/mine",
    "steps": 40,
    "max_steps": 60,
    "asked_to_stop": True,
    "stopped_early": False,
    "metric": "eval_loss",
    "best_metric": 1.5,
    "best_checkpoint": "/runs/mine/checkpoint_00000020",
    "latest_checkpoint": None,
    "train_loss": 1.25,
    "epoch": 0.5,
    "attempts": 2,
    "world_sizes": [2, 1],
    "skipped_steps": 0,
    "tokens": 1000,
    "tokens_per_second": None,
    "seconds": {"total": 12.5},
    "sharding": None,
    "manta": "0.1.0",
    "of a later version": 1,
}
METRICS = {
    "run": "/runs/mine",
    "rows": 12,
    "models": {
        name: {
            "checkpoint": f"/{name}",
            "loss": loss,
            "exact_match": 0.5,
            "bleu": None,
            "bleu_signature": "nrefs:1",
            "intervals": {"loss": [loss - 0.1, loss + 0.1], "exact_match": [0.4, 0.6], "bleu": None},
        }
        for name, loss in (("base", 2.0), ("<tuned>", 1.0))
    },
    "gains": {"<tuned>": {"exact_match": {"mean": 0.0, "interval": [-0.1, 0.1]}}},
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_function_also_when_its_room_was_imported(name):
    room = {"prepare": "preparation"}.get(name, name)
    imported = importlib.import_module(f"manta.{room}")
    assert inspect.isfunction(getattr(manta, name)) and getattr(manta, name).__module__ == "manta.api"
    assert inspect.ismodule(imported) and sys.modules[f"manta.{room}"] is imported


@pytest.mark.parametrize("name", STAGES)
def test_signatures_are_typed_and_errors_are_documented(name):
    stage = getattr(manta, name)
    signature = inspect.signature(stage)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"{parameter.name}:" in stage.__doc__
    assert "Returns:" in stage.__doc__ and "UserError:" in stage.__doc__


def test_looking_at_the_api_imports_nothing_heavy():
    code = (
        "import manta, sys\n"
        "from manta import Config, TrainResult, Evaluation, UserError\n"
        "manta.prepare, manta.train, manta.evaluate, manta.convert, dir(manta)\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_result_has_types_and_keeps_what_it_does_not_know():
    result = TrainResult.of(RESULT)
    assert (result.status, result.steps, result.world_sizes) == ("stopped", 40, (2, 1))
    assert result.run == Path("/runs/mine") and result.best_checkpoint == Path("/runs/mine/checkpoint_00000020")
    assert result.latest_checkpoint is None and result.tokens_per_second is None
    assert result.raw["of a later version"] == 1
    assert "raw" not in repr(result) and "best_metric=1.5" in repr(result)


def test_an_evaluation_has_figures_intervals_and_a_table():
    found = Evaluation.of(METRICS)
    tuned = found.models["<tuned>"]
    assert tuned["loss"] == 1.0 and tuned.intervals["loss"] == (0.9, 1.1) and tuned["bleu"] is None
    assert "bleu_signature" not in tuned.values and tuned.intervals["bleu"] is None
    assert found.gains["<tuned>"]["exact_match"] == Gain(0.0, (-0.1, 0.1))
    assert found.page == Path("/runs/mine/evaluation/report.html")
    table = found._repr_html_()
    assert table.count("<tr>") == 3 and "&lt;tuned&gt;" in table and "<td>0.5</td>" in table


def test_the_handlers_of_signals_are_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    wanted = threading.Event()
    with stopping_on_sigterm(wanted):
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as Ray Train does, and leaves it
        signal.raise_signal(signal.SIGTERM)
    assert wanted.is_set()
    assert {number: signal.getsignal(number) for number in before} == before


def test_another_thread_leaves_signals_alone():
    found = []

    def use() -> None:
        with stopping_on_sigterm(threading.Event()):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_what_counts_as_an_interrupt():
    assert was_interrupted(KeyboardInterrupt()) and was_interrupted(SystemExit(0))
    assert was_interrupted(RuntimeError("Worker exit detail: exit_actor() is called."))
    assert not was_interrupted(RuntimeError("The actor died because its node has died"))


@pytest.mark.slow
def test_mypy_sees_the_signatures(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import manta\n"
        "result = manta.train(manta.Config(max_steps=3), quiet=True)\n"
        "reveal_type(result)\n"
        "reveal_type(manta.evaluate(result).models['tuned']['loss'])\n"
        "reveal_type(manta.convert(result))\n"
        "manta.train('recipe.yaml')\n"
        "manta.prepare(manta.Config(max_stepz=3))\n"
    )
    mypy = Path(sys.executable).with_name("mypy")
    done = subprocess.run([mypy, program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    revealed = [line.rpartition("Revealed type is ")[2] for line in done.stdout.splitlines() if "Revealed" in line]
    assert revealed == ['"manta.results.TrainResult"', '"float | None"', '"pathlib.Path"'], done.stdout
    assert '"train" has incompatible type "str"; expected "Config"' in done.stdout
    assert 'Unexpected keyword argument "max_stepz" for "Config"' in done.stdout
