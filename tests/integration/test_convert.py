"""From checkpoint to a folder that plain transformers loads, and its scores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub import TOKEN, hub_server
from manta import card, manifest
from manta.cli import main
from manta.config import Config
from manta.convert import Options, convert
from manta.errors import TrainingError, UserError
from manta.runs import Run
from manta.train import train
from manta.versions import versions
from running import run_of, small_config

EVERY_TEN: dict[str, Any] = {"max_steps": 30, "eval_steps": 10, "save_steps": 10}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def lora(folder: Path, ray_cluster: None) -> Run:
    return run_of(train(small_config(folder, run_name="lora", save_total_limit=5, **EVERY_TEN)))


@pytest.fixture(scope="module")
def full(folder: Path, ray_cluster: None) -> Run:
    return run_of(train(small_config(folder, run_name="full", full_ft=True, **EVERY_TEN)))


def logits(model: Any, base: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer("Question: 3: what is the capital of Japan?\nAnswer: It is", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_merged_folder_equals_base_plus_adapter(lora):
    base = lora.config().hf_model_id
    out = convert(lora)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora.best().path / "model"
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (logits(merged, base) - logits(adapted, base)).abs().max() <= 1e-4
    assert (logits(merged, base) - logits(plain, base)).abs().max() > 1e-2
    assert merged.config.use_cache
    assert AutoTokenizer.from_pretrained(out).eos_token == AutoTokenizer.from_pretrained(base).eos_token
    assert manifest.damage(out) is None
    assert not list(out.rglob("*.bin"))


def test_any_checkpoint_is_converted_by_its_name(lora, tmp_path):
    for which, step in (("10", 10), ("latest", 30)):
        out = convert(lora, tmp_path / which, checkpoint=which)
        assert manifest.read(out)["checkpoint"] == f"checkpoint_{step:08d}"
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
        base = AutoModelForCausalLM.from_pretrained(lora.config().hf_model_id, dtype=torch.float32)
        reference = PeftModel.from_pretrained(base, lora.path / f"checkpoint_{step:08d}" / "model").merge_and_unload()
        assert all(torch.equal(merged[name], tensor) for name, tensor in reference.state_dict().items())
    with pytest.raises(UserError, match=r"no checkpoint 11. It has \[10, 20, 30\]"):
        convert(lora, tmp_path / "out", checkpoint="11")


def test_the_manifest_and_the_card_say_where_the_weights_come_from(lora, full, tmp_path):
    for run, library, merge in ((lora, "transformers", True), (lora, "peft", False), (full, "transformers", True)):
        out = convert(run, tmp_path / f"{run.name}-{library}", merge=merge)
        about, page = manifest.read(out), ModelCard.load(out / "README.md")
        assert about["data"] == run.prepared().name and about["metrics"] == run.best().metrics
        assert about["config"] == run.config().to_dict() and about["versions"]["torch"]
        assert page.data.library_name == library and page.data.pipeline_tag == "text-generation"
        assert ("lora" in page.data.tags) == (run is lora) and page.data.base_model is None
        for fact in (about["checkpoint"], about["data"], "learning_rate: 0.005", torch.__version__):
            assert fact in page.text
        assert str(run.path.parent) not in page.content, "a path of this machine is nobody's business"
        if merge:
            assert about["verified"]["difference"] <= about["verified"]["tolerance"] == 1e-4
            assert (out / "generation_config.json").exists() and "1e-04" in page.text
    assert manifest.read(tmp_path / "lora-transformers")["verified"]["effect"] > 1e-2


def test_a_base_and_datasets_of_the_hub_are_in_the_cards_metadata(tmp_path):
    config = Config.from_dict(
        {"hf_model_id": "Qwen/Qwen3-8B", "hf_dataset_config": {"dataset_name": "databricks/databricks-dolly-15k"}}
    )
    lineage = {"base_model": config.hf_model_id, "checkpoint": "checkpoint_00000010", "metrics": {"eval_loss": 1.25}}
    for merged, relation in ((True, "finetune"), (False, "adapter")):
        card.write(tmp_path, "mine", lineage | {"lora": True, "merged": merged, "versions": versions()}, config)
        data = metadata_load(tmp_path / "README.md")
        assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-8B", relation)
        assert data["datasets"] == ["databricks/databricks-dolly-15k"] and "sft" in data["tags"]


def test_a_model_that_is_not_what_was_trained_is_never_published(lora, tmp_path, monkeypatch):
    """The fault: half of the layers are left out, as a mapping of names that is wrong for a family would do."""
    from manta import adapter

    whole = adapter.changes

    def half(*arguments: Any) -> dict[str, adapter.Change]:
        return {name: change for name, change in whole(*arguments).items() if "layers.0" in name}

    monkeypatch.setattr(adapter, "changes", half)
    with pytest.raises(TrainingError, match="not the trained one"):
        convert(lora, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    arguments = ["convert", "--run", str(lora.path), "--output_dir", str(tmp_path / "out")]
    assert CliRunner().invoke(main, arguments).exit_code == 1 and list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(main, [*arguments, "--verify", "false"]).exit_code == 0
    assert "verified" not in manifest.read(tmp_path / "out")


def test_shards_are_no_larger_than_asked(full, tmp_path):
    out = convert(full, tmp_path / "out", options=Options(max_shard_size="100KB"))
    files = list(out.glob("model-*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 110_000
    assert manifest.damage(out) is None


def test_checkpoints_of_the_guides_own_code_are_converted(lora, full, tmp_path):
    base = lora.config().hf_model_id
    nested = [tmp_path / kind / "TorchTrainer_1" / "checkpoint_000003" / "checkpoint" for kind in ("lora", "full")]
    shutil.copytree(lora.best().path / "model", nested[0])
    AutoModelForCausalLM.from_pretrained(full.best().path / "model").save_pretrained(nested[1])
    AutoTokenizer.from_pretrained(base).save_pretrained(nested[1])
    for place, run, kind in zip(nested, (lora, full), ("lora", "full"), strict=True):
        ours = AutoModelForCausalLM.from_pretrained(convert(run)).state_dict()
        for number, flags in enumerate((("--checkpoint_dir", str(place)), ("--run", str(tmp_path / kind)))):
            out = tmp_path / f"{kind}-{number}"
            arguments = ["convert", *flags, "--base_model", base, "--output_dir", str(out)]
            done = CliRunner().invoke(main, arguments)
            assert done.exit_code == 0, done.output
            theirs = AutoModelForCausalLM.from_pretrained(out).state_dict()
            assert all(torch.equal(theirs[name], ours[name]) for name in ours)
            assert manifest.read(out)["base_model"] == base and (out / "tokenizer.json").exists()


def test_which_of_the_guides_checkpoints_is_meant_is_not_guessed(lora, tmp_path):
    for number in ("000001", "000002"):
        shutil.copytree(lora.best().path / "model", tmp_path / "run" / f"checkpoint_{number}" / "checkpoint")
    arguments = ["convert", "--run", str(tmp_path / "run")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and "--checkpoint_dir" in done.output and "000001" in done.output
    done = CliRunner().invoke(main, [*arguments, "--checkpoint", "latest"])
    assert done.exit_code == 2 and "--output_dir" in done.output
    done = CliRunner().invoke(main, [*arguments, "--checkpoint", "latest", "--output_dir", str(tmp_path / "out")])
    assert done.exit_code == 0 and manifest.read(tmp_path / "out")["checkpoint"] == "checkpoint_000002"
    done = CliRunner().invoke(main, ["convert", "--checkpoint_dir", str(tmp_path / "run" / "nothing")])
    assert done.exit_code == 2 and "holds no checkpoint" in done.output


def test_a_model_is_pushed_without_the_token_leaving_a_trace(lora, tmp_path):
    """The real client, in a process of its own, against a server that keeps what arrives."""
    command = [Path(sys.executable).with_name("manta"), "convert", "--run", lora.path, "--output_dir", tmp_path / "out"]
    with hub_server() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        environment.pop("HF_HUB_OFFLINE", None)

        def manta(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *flags], env={**environment, **variables}, capture_output=True, text=True, timeout=300
            )

        refused = manta("--push_to_hub", "me/numbers", HF_TOKEN="hf_wrong")
        assert refused.returncode == 2 and "hf auth login" in refused.stderr and "hf_wrong" not in refused.stderr
        assert not (tmp_path / "out").exists(), "the hub is asked before anything is computed"
        done = manta("--push_to_hub", "me/numbers", "--private")
        assert done.returncode == 0, done.stderr
        assert f"{hub.address}/me/numbers" in done.stdout
        hub.repositories["me/public"] = {"private": False, "files": {}}
        again = manta("--push_to_hub", "me/public", "--private", "--verify", "false")
        assert again.returncode == 2 and "is public" in again.stderr and hub.repositories["me/public"]["files"] == {}
    pushed = hub.repositories["me/numbers"]
    assert pushed["private"] is True and "manifest.json" not in pushed["files"]
    wanted = {file.name for file in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert pushed["files"].keys() == wanted >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    weights = load(pushed["files"]["model.safetensors"])
    ours = AutoModelForCausalLM.from_pretrained(convert(lora)).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights.items())
    for text in (done.stdout, done.stderr, again.stderr, *map(str, pushed["files"].values())):
        assert TOKEN not in text


def test_merged_and_adapter_answer_fifty_prompts_alike(demo, tmp_path):
    """The demo's run: token by token the same, and most answers right."""
    run = Run(demo.folder / "demo/results/tune")
    base = run.config().hf_model_id
    merged = AutoModelForCausalLM.from_pretrained(run.export)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.best().path / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    with (run.prepared() / "test.jsonl").open() as file:
        rows = [json.loads(line) for line, _ in zip(file, range(50), strict=False)]
    assert len(rows) == 50
    right = 0
    for row in rows:
        batch = tokenizer(row["input"], return_tensors="pt")
        answers = [
            model.eval().generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist() for model in (merged, adapted)
        ]
        assert answers[0] == answers[1]
        right += tokenizer.decode(answers[0][batch["input_ids"].shape[1] :], skip_special_tokens=True) == row["output"]
    assert right > 25


def test_full_checkpoint_of_two_workers_becomes_one_folder(full):
    out = convert(full)
    whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    shards = AutoModelForCausalLM.from_pretrained(full.best().path / "model", dtype=torch.float32)
    base = full.config().hf_model_id
    assert torch.equal(logits(whole, base), logits(shards, base))
    assert "distributed_config" not in json.loads((out / "config.json").read_text())
    with pytest.raises(UserError, match="no adapter"):
        convert(full, merge=False)


def test_adapter_is_kept_apart_on_request(lora, tmp_path):
    out = convert(lora, tmp_path / "adapter", merge=False)
    base = lora.config().hf_model_id
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    merged = AutoModelForCausalLM.from_pretrained(convert(lora), dtype=torch.float32)
    assert (logits(adapted, base) - logits(merged, base)).abs().max() <= 1e-4


def test_converting_again_replaces_its_own_folder_and_nobody_elses(lora, tmp_path):
    first = convert(lora, tmp_path / "out")
    (first / "model.safetensors").write_bytes(b"changed")
    assert manifest.damage(convert(lora, tmp_path / "out")) is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="output_dir"):
        convert(lora, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_damaged_best_checkpoint_is_passed_over(lora, tmp_path):
    run = Run(Path(shutil.copytree(lora.path, tmp_path / "lora")))
    best = run.best()
    weights = best.path / "model" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)
    out = convert(run, tmp_path / "out")
    assert manifest.read(out)["checkpoint"] != best.path.name
    for checkpoint in run.checkpoints():
        (checkpoint.path / "position.json").unlink()
    with pytest.raises(UserError, match=r"position\.json is missing"):
        convert(run, tmp_path / "out")
