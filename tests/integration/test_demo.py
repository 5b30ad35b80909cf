"""The demo, README's commands on what it left, and GSM8K on the demo's base model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from documents import commands
from manta.config import Config
from manta.convert import convert, load_tuned, usable_checkpoint
from manta.train import train
from running import logged, run_of

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

pytestmark = pytest.mark.slow


def test_the_tuned_model_clearly_wins(demo):
    report = json.loads((demo.folder / "demo/results/tune/evaluation/metrics.json").read_text())
    base, tuned = report["models"]["base"], report["models"]["tuned"]
    assert report["rows"] >= 50
    assert tuned["loss"] < base["loss"] / 4
    assert tuned["exact_match"] > base["exact_match"] + 0.5
    assert "exact match" in demo.output and f"{tuned['exact_match']:.1%}" in demo.output


def test_the_demo_pretrains_tunes_on_two_workers_and_stops_early(demo):
    results = {
        name: json.loads((demo.folder / f"demo/results/{name}/result.json").read_text())
        for name in ("pretrain", "tune")
    }
    for result in results.values():
        assert result["world_sizes"] == [2]
        assert len(result["sharding"]) == 2
        for worker in result["sharding"]:
            assert worker["replicated"] == 0
            assert worker["local_bytes"] == pytest.approx(worker["total_bytes"] / 2, rel=0.05)
    assert results["tune"]["stopped_early"] and results["tune"]["steps"] < results["tune"]["max_steps"]
    losses = logged_losses(demo.folder / "demo/results/pretrain/metrics.jsonl")
    assert losses[-1] < losses[0] / 3


def logged_losses(path: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]


def test_the_demo_again_is_at_once_and_the_same(demo):
    manta = Path(sys.executable).with_name("manta")
    done = subprocess.run([manta, "demo"], cwd=demo.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("finished already") == 2


def blocks(path: Path, languages: str) -> list[tuple[str, str]]:
    """(language, text) of a document's code blocks."""
    return re.findall(rf"^```({languages})\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


def run(demo, language: str, text: str) -> str:
    """A block as a reader runs it, in the demo's folder; what it printed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    done = subprocess.run([*program, text], cwd=demo.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def readme(demo) -> list[tuple[str, str, float]]:
    """README's blocks, what they print, and seconds: run in their order, in one folder, after the demo.

    `make` is dry here: its targets are the demo and this suite.
    """
    for name in ("recipes", "ray_train_sft.py", "convert_checkpoint_to_hf.py", "test_checkpoint.py", "Makefile"):
        (demo.folder / name).symlink_to(ROOT / name)
    outputs = []
    for language, text in blocks(ROOT / "README.md", "bash|python"):
        text = text.replace("source .venv/bin/activate\n", "")
        begun = time.monotonic()
        output = run(demo, language, re.sub(r"^make (\w+)", rf"make -C {ROOT} -n \1", text, flags=re.M))
        outputs.append((text, output, time.monotonic() - begun))
    return outputs


def test_every_command_of_the_readme_runs(demo, readme, record_property):
    """A new user's way: the demo, data of one's own, a look, a plan, training, the run's page, an answer by curl."""
    for text, _, seconds in readme:
        record_property(text.strip().splitlines()[0], f"{seconds:.1f} s")
    assert len(readme) >= 7
    assert any("42" in output for _, output, _ in readme), "the converted model answers README's own question"
    (answer,) = (output for text, output, _ in readme if "v1/completions" in text)
    assert re.search(r'"text": ?"[^"]+"', answer), "an answer by curl"
    assert "<svg" in (demo.folder / "results/numbers/report.html").read_text(encoding="utf-8")


def test_commands_of_the_other_documents_run_on_what_the_readme_left(demo, readme):
    """Those about its run, and what would be launched; servers and what needs a cluster are left to other tests."""
    shown = {" ".join(command.words): command for command in commands() if command.words[0] == "manta"}
    in_readme = {" ".join(command.words) for command in commands([ROOT / "README.md"])}
    about_it = [
        command.words
        for line, command in shown.items()
        if line not in in_readme
        and ("--dry_run" in command.words or ("results/numbers" in line and command.words[1] not in ("serve", "chat")))
    ]
    assert len(about_it) >= 3
    for words in about_it:
        short = ["--max_tokens", "8"] if words[1] == "evaluate" and "--max_tokens" not in words else []
        run(demo, "bash", shlex.join([*words, *short]))


def test_the_python_of_the_documents_runs(demo, readme):
    (found,) = blocks(ROOT / "docs" / "python.md", "python")
    assert "finished" in run(demo, *found)


@pytest.mark.skipif(not GSM8K.exists(), reason=f"GSM8K is not at {GSM8K}")
@pytest.mark.parametrize("full_ft", [False, True], ids=["lora", "full"])
def test_gsm8k_on_the_demos_base_model(demo, full_ft, tmp_path, ray_cluster, record_property):
    config = Config.from_dict(
        {
            "hf_model_id": str(demo.folder / "demo/base"),
            "full_ft": full_ft,
            "lora_target_modules": "all-linear",
            "max_steps": 60,
            "max_seq_length": 384,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "eval_steps": 20,
            "max_eval_samples": 64,
            "gradient_checkpointing": "none",
            "device": "cpu",
            "num_workers": 2,
            "results_dir": str(tmp_path),
            "data_dir": str(demo.folder / "prepared-gsm8k"),
            "hf_dataset_config": {
                "dataset_name": str(GSM8K),
                "input_template": "{question}\n",
                "output_template": "{answer}",
            },
        }
    )
    result = train(config)
    run = run_of(result)
    losses = logged(run, "eval_loss")
    record_property("eval_loss", str(losses))
    assert result["steps"] == 60 and result["world_sizes"] == [2]
    assert losses[60] < losses[40] < losses[20] < logged(run, "loss")[1]

    converted = AutoModelForCausalLM.from_pretrained(convert(run), dtype=torch.float32)
    tuned = load_tuned(run.config(), usable_checkpoint(run), torch.float32)
    rows = [json.loads(line) for line in (run.prepared() / "test.jsonl").read_text().splitlines()[:8]]
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    worst = 0.0
    with torch.no_grad():
        for row in rows:
            batch = tokenizer(row["input"] + row["output"], return_tensors="pt", truncation=True, max_length=384)
            worst = max(worst, float((converted(**batch).logits - tuned(**batch).logits).abs().max()))
    record_property("max_logit_difference", worst)
    assert worst <= 1e-4
