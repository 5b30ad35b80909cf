"""vLLM in an environment of its own, beside transformers: the same adapter, merged or not, says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manta import answers
from manta.convert import usable_checkpoint
from manta.data.tokenize import load_tokenizer
from manta.errors import UserError
from manta.generation import HfEngine, Sampling, VllmEngine, Weights
from manta.model import WEIGHTS
from manta.runs import open_run
from running import lines

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM: make vllm")
pytestmark = pytest.mark.slow


@needs_vllm
def test_merged_adapter_and_vllm_give_the_same_tokens(demo):
    run = open_run(demo.folder / "demo/results/tune")
    config = run.config()
    tokenizer: Any = load_tokenizer(config.hf_model_id)
    sampling = Sampling(max_tokens=8, temperature=0, max_model_len=256)
    setting = replace(answers.setting(config, tokenizer, sampling, "cpu"), most_rank=config.lora_rank)
    rows = answers.as_rows(lines(run.prepared() / "test.jsonl")[:50], tokenizer, config, sampling)
    prompts, targets = [row.prompt for row in rows], [row.target for row in rows]
    assert len(prompts) == 50 and all(prompts)
    tuned = Weights(config.hf_model_id, str(usable_checkpoint(run).path / WEIGHTS))
    hf, vllm = HfEngine(setting), VllmEngine(setting, str(PYTHON))
    by_adapter = hf.answer(tuned, prompts, targets, 0)
    merged = HfEngine(setting).answer(Weights(str(run.export)), prompts, targets, 0)
    by_vllm, base = (
        vllm.answer(tuned, prompts, targets, 0),
        vllm.answer(Weights(config.hf_model_id), prompts, targets, 0),
    )
    vllm.close()
    assert [each.ids for each in merged] == [each.ids for each in by_adapter]
    assert [each.ids for each in by_vllm] == [each.ids for each in by_adapter]
    assert [each.ids for each in base] != [each.ids for each in by_adapter]
    for one, other in zip(by_vllm, by_adapter, strict=True):
        assert one.cut == other.cut and one.scored == other.scored
        assert one.loss == pytest.approx(other.loss, abs=1e-2)


@needs_vllm
def test_evaluate_by_vllm_is_evaluate_by_transformers(demo):
    run = demo.folder / "demo/results/tune"
    reports = {}
    for engine in ("hf", "vllm"):
        command = [
            sys.executable,
            "-m",
            "manta",
            "evaluate",
            "--run",
            str(run),
            "--max_samples",
            "20",
            "--max_tokens",
            "8",
        ]
        command += ["--temperature", "0", "--engine", engine, "--vllm", str(PYTHON), "--max_model_len", "256"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        reports[engine] = json.loads((run / "evaluation" / "metrics.json").read_text())["models"]
    for name in ("base", "tuned"):
        ours, theirs = reports["hf"][name], reports["vllm"][name]
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-2)
        assert (theirs["exact_match"], theirs["bleu"]) == pytest.approx((ours["exact_match"], ours["bleu"]))


def test_an_environment_without_vllm_is_a_message(demo):
    setting = answers.Setting((0,), 0, Sampling(), "auto", "cpu")
    with pytest.raises(UserError, match=r"vLLM ended(.|\n)*vllm"):
        VllmEngine(setting, sys.executable).answer(Weights("x"), [[1]], [answers.Target([], [])], 0)
