"""Plans against what happens: the memory of real processes, and a real run's steps, tokens, choices and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from manta.plan import plan
from manta.train import train
from running import run_of, small_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import plan as bench  # noqa: E402

pytestmark = pytest.mark.slow

# Full with DDP's buckets and much logits; half precision with a part computed again; two workers with FSDP.
CHECKED = [
    (256, 2, 32_000, "full", "float32", "none", "padded", 4, 128, 1, 1),
    (128, 4, 8_000, "full", "bfloat16", "selective", "joined", 4, 256, 1, 1),
    (256, 4, 16_000, "lora", "bfloat16", "none", "padded", 2, 256, 1, 2),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Any) -> tuple[Any, dict[str, Any]]:
    """A run of two workers, and the config it had."""
    config = small_config(tmp_path_factory.mktemp("planned"), gradient_checkpointing="auto", eval_steps=0, save_steps=4,
                          lora_rank=32)  # fmt: skip
    return config, train(config)


@pytest.mark.parametrize("shape", CHECKED, ids=lambda shape: "-".join(map(str, shape)))
def test_the_estimate_is_within_15_percent_of_the_peak(shape, tmp_path, record_property):
    found = bench.compare(tmp_path, shape)
    record_property("ratios", f"{found['total']:.3f} in all, {found['net']:.3f} without imports")
    assert found["total"] == pytest.approx(1, abs=bench.LIMIT), found


def test_a_run_does_what_was_planned(trained):
    config, result = trained
    run = run_of(result)
    found = plan(config)
    chosen = next(event for event in run.events() if event["kind"] == "setup")
    for name in ("dtype", "attention", "layout", "gradient_checkpointing"):
        assert found["chosen"][name] == chosen[name]
    assert found["work"]["from"] == "prepared" and found["work"]["steps"] == result["steps"]
    assert found["work"]["tokens"] == pytest.approx(result["tokens"], rel=0.1)
    folder = run.latest().path
    size = sum(path.stat().st_size for kind in ("model", "optimizer") for path in (folder / kind).rglob("*"))
    assert size == pytest.approx(found["disk"]["checkpoint"], rel=0.3)  # headers weigh at this size
    kept = len(run.checkpoints())
    assert kept <= found["disk"]["at_once"]


def test_hours_are_those_of_an_earlier_run_of_the_model(trained):
    config, result = trained
    time = plan(config.model_copy(update={"max_steps": 1000}))["time"]
    assert time["tokens_per_second"] == result["tokens_per_second"] and run_of(result).name in time["from"]
    half = plan(config.model_copy(update={"num_workers": 1, "run_name": "other"}))["time"]
    assert half["tokens_per_second"] == pytest.approx(result["tokens_per_second"] / 2, rel=0.01)
    assert "scaled" in half["from"]
    assert plan(config.model_copy(update={"full_ft": True}))["time"]["hours"] is None


def test_the_probe_measures_what_was_estimated(trained):
    config, _ = trained
    recipe = Path(config.results_dir).parent / "recipe.yaml"
    recipe.write_text(config.model_copy(update={"num_workers": 1}).dump())
    manta = Path(sys.executable).with_name("manta")
    done = subprocess.run(
        [manta, "plan", "--config", recipe, "--probe", "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["probe"]["ratio"] == pytest.approx(1, abs=0.15)
    assert found["probe"]["peak"] > found["probe"]["loaded"] > 0
    assert found["time"]["tokens_per_second"] == pytest.approx(found["probe"]["tokens_per_second"], rel=0.01)
    assert "probe" in found["time"]["from"] and found["time"]["hours"] > 0


def test_a_probe_that_fails_says_why(trained):
    config, _ = trained
    from manta.errors import UserError
    from manta.probe import probe
    from manta.simulation import Shape

    broken = config.model_copy(update={"hf_model_id": str(Path(config.results_dir) / "nothing")})
    with pytest.raises(UserError, match=r"The probe failed .*nothing"):
        probe(broken, "cpu", 1, Shape(1, 32), "none")
