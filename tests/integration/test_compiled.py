"""Layers that are compiled under way train as they did before, and the run says whether that paid."""

from __future__ import annotations

import re
import shutil

import pytest

from manta.train import train
from running import lines, logged, max_gap, run_of, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which is not here"),
]


def test_layers_are_compiled_and_judged_on_both_workers(tmp_path):
    usual = {"max_steps": 16, "eval_steps": 0, "save_steps": 16, "step_copies": "off", "lora_dropout": 0}
    plain = run_of(train(small_config(tmp_path, run_name="plain", **usual)))
    compiled = run_of(train(small_config(tmp_path, run_name="compiled", torch_compile=True, **usual)))
    (told,) = [event["text"] for event in lines(compiled.events_file) if "layers compiled" in event.get("text", "")]
    assert re.search(
        r"in \d+ s: a token takes \d+% (less time, which has paid after [\d,]+ steps|more time, so they)", told
    )
    assert max_gap(logged(plain, "loss"), logged(compiled, "loss")) <= 1e-4
