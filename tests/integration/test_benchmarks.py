"""The benchmarks run, their arms agree, and no lever of speed has lost more than 30 % of what is on record."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GSM8K = BENCHMARKS.parents[1] / "shared" / "data" / "gsm8k"

sys.path.append(str(BENCHMARKS))
import micro  # noqa: E402

pytestmark = pytest.mark.slow


def bench(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=BENCHMARKS, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", micro.BENCHES)
def test_a_lever_keeps_its_worth(name):
    """The best of three: other work on the machine can hide a lever, and cannot make one."""
    wanted = micro.KEPT * json.loads(micro.RECORD.read_text())[name]
    found = []
    while len(found) < 3 and max(found, default=0) < wanted:
        found.append(micro.ratio(name))
    assert max(found) >= wanted, found


@pytest.mark.skipif(not GSM8K.exists(), reason=f"GSM8K is not at {GSM8K}")
def test_manta_and_trl_have_the_same_losses():
    """Padded by TRL, without padding by Manta, float32: the same samples, tokens, adapters and steps."""
    told = bench("training.py", "--quick", "--steps", "5", "--data", "gsm8k", "--dtype", "float32", "--arms", "manta",
                 "trl padded")  # fmt: skip
    gap = re.search(r"\| trl padded \|.*\| (\S+) \|$", told, re.M)
    assert gap and float(gap[1]) <= 1e-4, told


def test_the_gpu_script_runs_on_a_cpu_with_a_toy_shape():
    told = bench("gpu.py", "--toy", "--steps", "4")
    assert re.search(r"\| toy, LoRA \| manta \| [\d,]+ \|", told) and "| toy, LoRA | trl |" in told
