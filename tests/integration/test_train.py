"""Whole runs on two workers: what is trained, what is left on disk, when they stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manta import manifest
from manta.config import Config
from manta.data import source
from manta.preparation import prepare_only
from manta.runs import Run
from manta.train import train
from running import (
    CANARY,
    logged,
    max_difference,
    max_gap,
    on_workers,
    order_of,
    prepared_of,
    run_of,
    small_config,
    weights,
)
from tiny import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module", params=["lora", "full"])
def result(request: pytest.FixtureRequest, folder: Path, ray_cluster: None) -> dict[str, Any]:
    return train(small_config(folder, full_ft=request.param == "full", sharding_strategy="FULL_SHARD"))


def test_eval_loss_falls(result):
    values = list(logged(run_of(result), "eval_loss").values())
    assert len(values) == 2 and values[1] < values[0]
    assert result["best_metric"] == values[1]


def test_base_is_sharded_in_halves_over_both_workers(result):
    assert len(result["sharding"]) == 2
    for worker in result["sharding"]:
        assert worker["replicated"] == 0 and worker["sharded"] >= 20
        assert 0.45 <= worker["local_bytes"] / worker["total_bytes"] <= 0.55


def test_a_frozen_base_is_whole_by_default_and_training_the_same(result, folder):
    if run_of(result).config().full_ft:
        pytest.skip("what is trained is sharded")
    plain = train(small_config(folder, run_name="whole", gradient_checkpointing="auto"))
    (setup,) = [event for event in run_of(plain).events() if event["kind"] == "setup"]
    assert setup["sharding_strategy"] == "NO_SHARD" and ", NO_SHARD, " in setup["text"]
    for worker in plain["sharding"]:
        assert worker["sharded"] == 0 and worker["local_bytes"] == worker["total_bytes"]
    assert max_gap(logged(run_of(plain), "loss"), logged(run_of(result), "loss")) <= 1e-5


def test_trained_weights_moved(result, folder):
    run = run_of(result)
    first, last = weights(run, 6), weights(run, 12)
    assert all(not torch.equal(first[name], last[name]) for name in last if "lora_A" not in name)
    if run.config().full_ft:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
        assert base.keys() == last.keys()
        assert all(not torch.equal(base[name], last[name]) for name in last)
    else:
        assert last.keys() and all("lora_" in name for name in last)  # the base is in no checkpoint
        assert all(float(last[name].abs().max()) > 0 for name in last)  # lora_B starts as zeros


def test_result_says_how_it_ended(result):
    run = run_of(result)
    assert json.loads(run.result_file.read_text()) == result
    assert result["status"] == "finished" and result["failure"] is None and result["stopped_early"] is False
    assert (result["steps"], result["max_steps"]) == (12, 12)
    assert (result["attempts"], result["world_sizes"]) == (1, [2])
    assert result["metric"] == "eval_loss"
    assert result["best_checkpoint"] == result["latest_checkpoint"] == str(run.path / "checkpoint_00000012")
    assert result["train_loss"] == logged(run, "loss")[12]
    assert result["tokens_per_second"] > 0
    seconds = result["seconds"]
    assert seconds["total"] >= seconds["fit"] >= seconds["until_first_step"] > 0
    parts = [seconds[name] for name in ("start_workers", "imports", "model", "first_step")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(seconds["until_first_step"], abs=0.01)
    assert {path.name for path in run.path.glob("*_results.json")} == {"all_results.json", "train_results.json"}


def test_every_token_is_counted_once(result):
    run = run_of(result)
    config = run.config()
    samples = prepared_of(config).tokenized("training")
    order = order_of(config)
    steps = [order.micro_batch(step, index) for step in range(12) for index in range(order.micro_batches)]
    assert result["tokens"] == sum(len(samples[row]["input_ids"]) for batch in steps for row in batch)


def test_checkpoints_are_complete_and_unharmed(result):
    found = run_of(result).checkpoints()
    assert [checkpoint.step for checkpoint in found] == [6, 12]
    assert [manifest.damage(checkpoint.path) for checkpoint in found] == [None, None]
    assert manifest.read(found[0].path)["world_size"] == 2
    assert found[1].eval_loss == logged(run_of(result), "eval_loss")[12]


def test_cosine_ends_at_min_learning_rate(result):
    run = run_of(result)
    config = run.config()
    rates = logged(run, "learning_rate")
    assert rates[1] == 0 and rates[2] == config.learning_rate  # one step of warm-up
    assert all(rates[step + 1] < rates[step] for step in range(2, 12))
    after = json.loads((run.path / "checkpoint_00000012" / "scheduler.json").read_text())["_last_lr"]
    assert after == pytest.approx([config.min_learning_rate] * len(after), rel=1e-6)


def test_no_secret_is_written(result, folder):
    """Each worker had it in its environment."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_only_the_optimizers_index_is_a_pickle(result):
    names = {path.name for path in run_of(result).path.rglob("*") if path.is_file()}
    assert "training_args.bin" not in names
    allowed = (".json", ".jsonl", ".yaml", ".safetensors", ".log", ".distcp", ".metadata", ".validate_storage_marker")
    assert [name for name in names if not name.endswith(allowed)] == []
    pickles = [
        path for path in run_of(result).path.rglob("*") if path.is_file() and path.read_bytes()[:2] == b"\x80\x02"
    ]
    assert {path.name for path in pickles} <= {".metadata"}


def test_finished_run_is_left_alone(result, capsys):
    run = run_of(result)
    before = manifest.digests(run.path)
    assert train(run.config()) == result
    assert manifest.digests(run.path) == before
    assert "finished already" in capsys.readouterr().err


def test_saved_config_repeats_the_run(result, folder):
    run = run_of(result)
    config = Config.load(run.config_file, {"run_name": f"again-{run.name}"})
    again = train(config)
    assert again["run"] != result["run"]
    assert "prepare" not in again["seconds"]
    assert max_difference(weights(run_of(again), 12), weights(run, 12)) == 0
    assert logged(run_of(again), "loss") == logged(run, "loss")


def test_stops_when_eval_loss_no_longer_falls_and_keeps_best_and_newest(tmp_path):
    """Training answers teach letters that no validation answer has, so that eval loss soon rises."""
    config = small_config(
        tmp_path,
        full_ft=True,
        max_steps=40,
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        early_stopping_patience=3,
        data={"input_template": "{number}", "output_template": "{answer}", "dataset_name": str(tmp_path / "odd.jsonl")},
    )
    splits = source.assign_splits(96, config.hf_dataset_config, config.seed)
    rows = [{"number": i, "answer": ("0 1 2 3 " if split == 0 else "w x y z ") * 4} for i, split in enumerate(splits)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(config)
    run = run_of(result)
    losses = logged(run, "eval_loss")
    best = min(losses, key=lambda step: losses[step])
    last = best + 3 * config.eval_steps
    assert list(losses) == list(range(2, last + 1, 2)) and 0 < best < last < 40
    assert result["stopped_early"] is True and result["status"] == "finished" and result["steps"] == last
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [best, last]
    assert result["best_checkpoint"] == str(run.checkpoints()[0].path)
    assert result["latest_checkpoint"] == str(run.checkpoints()[1].path)
    assert result["best_metric"] == losses[best]


def test_epochs_give_the_number_of_steps(tmp_path):
    config = small_config(tmp_path, num_train_epochs=1.5, num_workers=1, eval_steps=0, max_steps=3)
    result = train(config)
    samples = len(prepared_of(config).tokenized("training"))
    assert samples == 72
    assert result["max_steps"] == result["steps"] == 27  # 1.5 · 72 rows / (2 · 2) rows a step
    assert result["epoch"] == pytest.approx(1.5)
    assert result["sharding"][0]["sharded"] == 0  # one worker: nothing to shard over
    rates = logged(run_of(result), "learning_rate")
    assert rates[27] < 0.01 * config.learning_rate  # the schedule is as long as the epochs, not as max_steps


# --- Ways to shard and to compute, all in one pair of workers.


def train_variants(argument: dict[str, Any]) -> dict[str, Any]:
    """On each worker: for each variant train to half, save, build anew from the checkpoint, and train on."""
    from accelerate.state import AcceleratorState, GradientState
    from ray import train as ray_train
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from manta import activations, checkpoint, model, worker
    from manta.callbacks import RayTrainReportCallback
    from manta.data.prepare import Prepared
    from manta.runs import checkpoint_path
    from manta.saver import Saver

    world = ray_train.get_context().get_world_size()

    def local(parameter: torch.Tensor) -> torch.Tensor:
        data = parameter.data
        return (data.to_local() if isinstance(data, DTensor) else data).clone()

    def one(values: dict[str, Any]) -> dict[str, Any]:
        run = Run(Path(argument["runs"]) / values["run_name"])
        prepared = Prepared(Path(values.pop("prepared")))
        logs: dict[str, dict[int, float]] = {"loss": {}, "eval_loss": {}}
        for stop, start in ((6, 0), (None, 6)):
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            config = Config.from_dict({**values, "stop_at_step": stop})
            resume = checkpoint_path(run.path, start) if start else None
            dtype = model.compute_dtype(config, native=False)
            placement = model.Placement(torch.device("cpu"), world, dtype=dtype)
            network = model.build(config, placement, resume / "model" if resume else None)
            model.assert_sharded(network, config, placement)
            before = {name: local(parameter) for name, parameter in network.named_parameters()}
            saver = Saver(run, start, None, config.async_save, print)
            layout = model.settle_layout(network, config, placement)
            activations.recompute(network, config.gradient_checkpointing)
            trainer = worker.make_trainer(config, run, prepared, network, saver, start, placement, layout)
            trainer.remove_callback(RayTrainReportCallback)
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            saver.wait()
            for log in trainer.state.log_history:
                for key in logs:
                    if key in log:
                        logs[key][log["step"]] = log[key]
        after = {name: local(parameter) for name, parameter in network.named_parameters()}
        return {
            **logs,
            "sharding": checkpoint.gather(model.sharding(network)),
            "moved": sorted(name for name in after if not torch.equal(before[name], after[name])),
            "still": sorted(name for name in after if torch.equal(before[name], after[name])),
            "dtypes": sorted({str(parameter.dtype) for parameter in network.parameters() if parameter.requires_grad}),
            "base_dtypes": sorted(
                {str(each.dtype) for name, each in network.named_parameters() if "lora_" not in name}
            ),
            "units": sorted(name for name, module in network.named_modules() if isinstance(module, FSDPModule)),
        }

    return {name: one({**values, "run_name": name}) for name, values in argument["variants"].items()}


def build_apart(argument: dict[str, Any]) -> list[str]:
    """On each worker: load the model, where rank 1 by itself would find that nothing can be estimated."""
    import numpy as np
    from ray import train as ray_train

    from manta import checkpoint, fit, model

    context = ray_train.get_context()
    if context.get_world_rank() == 1:
        fit.at_most = fit.estimate = lambda *arguments: None
    placement = model.Placement(torch.device("cpu"), context.get_world_size())
    _, _, settled = fit.build(Config.from_dict(argument["config"]), placement, np.full(8, 96))
    return checkpoint.gather(settled.config.sharding_strategy)


def test_all_ranks_settle_on_what_the_first_does(folder):
    config = small_config(folder, gradient_checkpointing="auto")
    assert on_workers(build_apart, {"config": config.to_dict()}, folder / "apart") == ["NO_SHARD", "NO_SHARD"]


def gpt2(folder: Path) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def variants(folder: Path, ray_cluster: None) -> dict[str, Any]:
    other = gpt2(folder / "gpt2")
    settings: dict[str, dict[str, Any]] = {
        "lora": {},
        "full": {"full_ft": True},
        "lora-grad-op": {"sharding_strategy": "SHARD_GRAD_OP"},
        "full-grad-op": {"sharding_strategy": "SHARD_GRAD_OP", "full_ft": True},
        "full-hybrid": {"sharding_strategy": "HYBRID_SHARD", "full_ft": True},
        "lora-ddp": {"sharding_strategy": "NO_SHARD"},
        "full-ddp": {"sharding_strategy": "NO_SHARD", "full_ft": True},
        "full-offload": {"fsdp_cpu_offload": True, "full_ft": True},
        "lora-recompute": {"gradient_checkpointing": "full"},
        "full-recompute": {"gradient_checkpointing": "full", "full_ft": True},
        "lora-bf16": {"dtype": "bfloat16"},
        "full-bf16": {"dtype": "bfloat16", "full_ft": True},
        "lora-all-linear": {"lora_target_modules": "all-linear"},
        "full-gpt2": {"hf_model_id": other, "full_ft": True},
        "lora-gpt2": {"hf_model_id": other, "lora_target_modules": "c_attn,c_proj"},
    }
    made: dict[str, Any] = {}
    for name, values in settings.items():
        values = {"sharding_strategy": "FULL_SHARD", **values}
        config = small_config(folder, nominal_workers=2, lora_dropout=0.1, **values)
        made[name] = {**config.to_dict(), "prepared": str(prepare_only(config))}
    return on_workers(train_variants, {"variants": made, "runs": str(folder / "variants")}, folder / "ray")


SHARDED = ["lora-grad-op", "full-grad-op", "full-hybrid", "full-offload", "lora-recompute", "full-recompute"]


@pytest.mark.parametrize("name", [*SHARDED, "lora-ddp", "full-ddp"])
def test_way_of_sharding_does_not_change_training(variants, name):
    """Also over a save and a resume in the middle."""
    ours, plain = variants[name], variants[name.partition("-")[0]]
    assert list(ours["loss"]) == list(range(1, 13))
    assert max_gap(ours["loss"], plain["loss"]) <= 1e-5
    assert max_gap(ours["eval_loss"], plain["eval_loss"]) <= 1e-5


@pytest.mark.parametrize("name", ["lora", "full", *SHARDED, "lora-bf16", "full-bf16", "full-gpt2", "lora-gpt2"])
def test_each_worker_holds_half_and_each_layer_is_a_unit(variants, name):
    ours = variants[name]
    for worker in ours["sharding"]:
        assert worker["replicated"] == 0
        assert 0.45 <= worker["local_bytes"] / worker["total_bytes"] <= 0.55
    layers = ["transformer.h.0", "transformer.h.1"] if "gpt2" in name else ["model.layers.0", "model.layers.1"]
    assert all(any(unit.endswith(layer) for unit in ours["units"]) for layer in layers), ours["units"]


@pytest.mark.parametrize("name", ["lora-ddp", "full-ddp"])
def test_no_shard_keeps_whole_parameters(variants, name):
    for worker in variants[name]["sharding"]:
        assert worker["sharded"] == 0 and worker["local_bytes"] == worker["total_bytes"]


@pytest.mark.parametrize("name", ["lora", "lora-grad-op", "lora-ddp", "lora-bf16", "lora-all-linear", "lora-gpt2"])
def test_lora_moves_adapters_and_nothing_of_the_base(variants, name):
    ours = variants[name]
    assert ours["moved"] and all("lora_" in each for each in ours["moved"])
    assert ours["still"] and not any("lora_" in each for each in ours["still"])


@pytest.mark.parametrize("name", ["full", "full-ddp", "full-hybrid", "full-bf16", "full-gpt2"])
def test_full_moves_everything(variants, name):
    assert variants[name]["still"] == []


@pytest.mark.parametrize("name", ["lora-bf16", "full-bf16", "full-gpt2", "lora-gpt2", "lora-all-linear"])
def test_loss_falls_with(variants, name):
    values = list(variants[name]["eval_loss"].values())
    assert values[1] < values[0] < 6.2


def test_bf16_trains_float32_weights_near_the_float32_run(variants):
    for name in ("lora", "full"):
        ours, plain = variants[f"{name}-bf16"], variants[name]
        assert ours["dtypes"] == ["torch.float32"]
        assert 0 < max_gap(ours["loss"], plain["loss"]) < 0.05
    assert variants["lora-bf16"]["base_dtypes"] == ["torch.bfloat16"]
    assert variants["full-bf16"]["base_dtypes"] == ["torch.float32"]
