"""From checkpoint to a folder that plain transformers loads, and its scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from manta import manifest
from manta.convert import convert
from manta.errors import UserError
from manta.runs import Run
from manta.train import train
from running import run_of, small_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def lora(folder: Path, ray_cluster: None) -> Run:
    return run_of(train(small_config(folder, run_name="lora", max_steps=30, eval_steps=10, save_steps=10)))


@pytest.fixture(scope="module")
def full(folder: Path, ray_cluster: None) -> Run:
    settings: dict[str, Any] = {"full_ft": True, "max_steps": 30, "eval_steps": 10, "save_steps": 10}
    return run_of(train(small_config(folder, run_name="full", **settings)))


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
