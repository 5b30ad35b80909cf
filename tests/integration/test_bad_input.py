"""Wrong input: one message that says what to do, exit code 2, no worker, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from running import MODEL_AND_DATA, small_config, write_rows
from tiny import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `manta train` with MODEL_AND_DATA would work."""
    folder = tmp_path_factory.mktemp("bad")
    write_rows(folder / "rows.jsonl")
    tiny_model(folder / "base")
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": \n{"question": "a", "ans\n')
    turns = '{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}'
    (folder / "chat.jsonl").write_text(f'{{"messages": [{turns}]}}\n' * 100)
    (folder / "three.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 3)
    cut = Path(tiny_model(folder / "cut")) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    bare = Path(tiny_model(folder / "bare"))
    (bare / "model.safetensors").unlink()
    (folder / "typo.yaml").write_text("learning_rat: 1.0e-4\n")
    (folder / "list.yaml").write_text("- max_steps\n")
    (folder / "nogpu").mkdir()
    return folder


def files(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return found - {"prepared", "ray"}  # where data and Ray would go; empty, or their files are in the set


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def as_a_user_has_it(folder: Path) -> dict[str, str]:
    """The environment, with the hub and without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return environment | {"CUDA_VISIBLE_DEVICES": "", "RAY_TMPDIR": str(folder / "ray")}


def manta(folder: Path, settings: dict[str, Any], limit: float = 60) -> tuple[subprocess.CompletedProcess[str], float]:
    """`manta train` in a process of its own, in `folder`."""
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "manta", "train", *flags(settings)],
        cwd=folder,
        env=as_a_user_has_it(folder),
        capture_output=True,
        text=True,
        timeout=limit,
    )
    return process, time.monotonic() - start


# Imports once what `manta train` imports; each command is then a process of its own, forked from it.
FORKING = """
import json, os, sys
import manta.train
from manta.cli import main

manta.spares.preload()
for line in sys.stdin:
    outputs, arguments = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for number, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    main(arguments)
"""


@pytest.fixture(scope="module")
def manta_at_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """The same without the imports: a function of settings that gives exit code, output and errors."""
    outputs = [tmp_path_factory.mktemp("said") / name for name in ("out", "err")]
    command, environment = [sys.executable, "-c", FORKING], as_a_user_has_it(folder)
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(settings: dict[str, Any]) -> tuple[int, str, str]:
            print(json.dumps([[*map(str, outputs)], ["train", *flags(settings)]]), file=server.stdin, flush=True)
            return int(server.stdout.readline()), *(output.read_text() for output in outputs)

        yield run
        server.stdin.close()


# What is wrong, and what the message must say: the setting or file at fault, and what to type instead.
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown flag": ({"learning_rat": "1e-4"}, ["--learning_rat", "--learning_rate"]),
    "unknown data flag": ({"hfdc_train_split": "0.5"}, ["--hfdc_train_split", "--hfdc_train_split_ratio"]),
    "wrong type": ({"max_steps": "many"}, ["max_steps", "integer", "'many'"]),
    "out of range": ({"lora_dropout": "1.5"}, ["lora_dropout", "less than 1", "'1.5'"]),
    "ratio over 1": ({"hfdc_train_split_ratio": "1.5"}, ["train_split_ratio", "less than or equal to 1", "'1.5'"]),
    "ratio under 0": ({"hfdc_val_test_split_ratio": "-0.1"}, ["val_test_split_ratio", "greater than or equal to 0"]),
    "mapping is not JSON": ({"hfdc_field_mapping": "{a:b}"}, ["field_mapping", "not JSON"]),
    "mapping of nothing": ({"hfdc_field_mapping": '{"inptu": "question"}'}, ["field_mapping", "inptu"]),
    "malformed template": ({"hfdc_input_template": "{question"}, ["input_template"]),
    "missing recipe": ({"config": "none.yaml"}, ["none.yaml", "--config"]),
    "unknown recipe key": ({"config": "typo.yaml"}, ["learning_rat", "Did you mean learning_rate?"]),
    "recipe is a list": ({"config": "list.yaml"}, ["list.yaml", "list"]),
    "no GPU": ({"device": "cuda"}, ["--device cuda", "no GPU", "--device cpu"]),
    "missing data file": ({"hfdc_dataset_name": "./none.jsonl"}, ["none.jsonl", "--hfdc_dataset_name"]),
    "data of no known kind": ({"hfdc_dataset_name": "base/config.txt"}, ["config.txt", "--hfdc_dataset_name"]),
    "template of a missing field": ({"hfdc_input_template": "{questio}"}, ["input_template", "Did you mean question?"]),
    "mapping to a missing column": (
        {"hfdc_field_mapping": '{"question": "asked"}'},
        ["input_template", "asked", "['question', 'answer']"],
    ),
    "empty dataset": ({"hfdc_dataset_name": "empty.jsonl"}, ["empty.jsonl", "no rows", "--hfdc_dataset_name"]),
    "broken JSON": ({"hfdc_dataset_name": "broken.jsonl"}, ["broken.jsonl", "not JSON", "--hfdc_dataset_name"]),
    "conversations without a template": (
        {"hfdc_dataset_name": "chat.jsonl", "hfdc_format": "messages"},
        ["no chat template", "--chat_template", "qwen3"],
    ),
    "empty validation split": ({"hfdc_dataset_name": "three.jsonl"}, ["validation", "--hfdc_train_split_ratio"]),
    "folder of other files": ({"hfdc_dataset_name": "base"}, ["base", "cannot be read", "one array of objects"]),
    "unknown LoRA target": ({"lora_target_modules": "q_proj,qkv"}, ["lora_target_modules", "['qkv']", "v_proj"]),
    "truncated weights": ({"hf_model_id": "cut"}, ["model.safetensors", "cut off", "Download"]),
    "no weights": ({"hf_model_id": "bare"}, ["bare", "*.safetensors", "--hf_model_id"]),
    "sequences over the model": ({"max_seq_length": "4096"}, ["max_seq_length", "512"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_message_before_anything_starts(folder, manta_at_once, case, record_property):
    settings, parts = WRONG[case]
    before = files(folder)
    code, output, message = manta_at_once(MODEL_AND_DATA | settings)
    record_property("message", message)
    assert code == 2, message
    assert output == ""
    message = message.strip()
    assert all(part in message for part in parts), message
    assert "Traceback" not in message and "Warning" not in message
    if "flag" in case:  # click's own form: usage, a blank line, the error
        assert message.splitlines()[-1].startswith("Error: ")
    else:
        assert message.startswith("manta: ") and len(message.splitlines()) == 1
    assert files(folder) == before  # no run, no data, and no Ray


@pytest.mark.parametrize("name", ["no-such-owner-of-manta/no-such-model", "./no-such-folder"])
def test_model_that_is_nowhere_is_said_within_a_minute(folder, name, record_property):
    before = files(folder)
    process, seconds = manta(folder, MODEL_AND_DATA | {"hf_model_id": name}, limit=120)
    record_property("message", f"{seconds:.1f} s: {process.stderr}")
    assert process.returncode == 2, process.stderr
    message = process.stderr.strip()
    assert message.startswith(f"manta: The model {name} is neither a folder") and "--hf_model_id" in message
    assert len(message.splitlines()) == 1
    assert seconds < 60
    assert files(folder) == before


def test_two_mistakes_are_both_named(folder):
    process, _ = manta(folder, MODEL_AND_DATA | {"max_steps": "0", "learning_rate": "fast"})
    assert process.returncode == 2
    assert "max_steps" in process.stderr and "learning_rate" in process.stderr


# Found out only with Ray: how many workers fit, and what tokenizing leaves.


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"num_workers": 3}, ["3 workers", "room for 2", "--num_workers"]),
        ({"resources_per_worker": {"CPU": 1, "TPU": 1}}, ["2 workers", "room for 0", "--resources_per_worker"]),
        ({"data": {"input_template": "{question} " * 40}}, ["training", "no_trained_token", "--max_seq_length"]),
        ({"overlong_policy": "error", "max_seq_length": 16}, ["max_seq_length 16", "--overlong_policy"]),
        ({"data": {"output_template": "{blank}"}}, ["empty_output", "templates"]),
    ],
    ids=["too many workers", "resource nobody has", "prompts over the limit", "overlong is an error", "no output"],
)
def test_nothing_is_left_when_ray_finds_out(ray_cluster, tmp_path, settings, parts):
    from manta.errors import UserError
    from manta.train import train

    config = small_config(tmp_path, run_name="bad", **settings)
    rows = [{**json.loads(line), "blank": " "} for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        train(config)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "prepared").exists() or list((tmp_path / "prepared").iterdir()) == []


def test_too_many_workers_for_this_machine_on_a_ray_of_its_own(folder):
    before = files(folder)
    settings = MODEL_AND_DATA | {"num_workers": 1000}
    process = subprocess.run(
        [sys.executable, "-m", "manta", "train", *flags(settings)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2, process.stderr
    message = process.stderr.strip()
    assert message.startswith("manta: 1000 workers") and "--num_workers" in message
    assert len(message.splitlines()) == 1
    assert files(folder) == before
