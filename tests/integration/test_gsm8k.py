"""Real questions and answers: GSM8K, where the data lies beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manta.train import train
from running import logged, run_of, small_config
from tiny import tiny_model

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason=f"GSM8K is not at {DATA}"),
    pytest.mark.usefixtures("ray_cluster"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()[:500]]
    tiny_model(folder / "base", text=[row["question"] + row["answer"] for row in rows])
    return folder


@pytest.fixture(scope="module", params=["lora", "full"])
def result(request: pytest.FixtureRequest, folder: Path, ray_cluster: None) -> dict[str, Any]:
    return train(
        small_config(
            folder,
            full_ft=request.param == "full",
            max_steps=60,
            max_seq_length=384,
            gradient_accumulation_steps=1,
            eval_steps=20,
            save_steps=30,
            max_eval_samples=32,
            data={"dataset_name": str(DATA), "train_split_ratio": 0.9, "val_test_split_ratio": 0.5, "num_proc": 2},
        )
    )


def test_eval_loss_falls_over_60_steps(result, record_property):
    run = run_of(result)
    losses = logged(run, "eval_loss")
    record_property("eval_loss", str(losses))
    assert result["status"] == "finished" and result["steps"] == 60 and result["world_sizes"] == [2]
    assert losses[60] < losses[40] < losses[20] < logged(run, "loss")[1]
    assert losses[60] < losses[20] - 0.05
    counts = json.loads((run.path.parents[1] / "prepared").glob("*/manifest.json").__next__().read_text())["counts"]
    assert sum(counts[split]["rows"] for split in ("training", "validation", "test")) == 7473
