"""The guide's own driver code, with Manta's names in it."""

from __future__ import annotations

import json

import pytest

from manta import Config, train_func
from manta.runs import Run
from running import small_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_the_guides_torch_trainer_runs_train_func(tmp_path):
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = small_config(tmp_path, max_steps=6, eval_steps=3, save_steps=3, data={"num_proc": 1})
    result = TorchTrainer(
        train_loop_per_worker=train_func,
        train_loop_config=config.to_dict(),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}, placement_strategy="SPREAD"),
        torch_config=TorchConfig(backend="gloo", timeout_s=7200),
        run_config=RunConfig(
            name=config.hf_model_id.replace("/", "-"),
            storage_path=str(tmp_path / "results"),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=2),
        ),
    ).fit()
    run = Run(tmp_path / "results" / config.hf_model_id.replace("/", "-"))
    assert result.return_value["step"] == 6
    assert result.checkpoint.path == str(run.latest().path)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [3, 6]
    assert len((run.prepared() / "training.jsonl").read_text().splitlines()) == 72
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
