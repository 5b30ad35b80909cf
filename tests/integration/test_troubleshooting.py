"""Every error of docs/troubleshooting.md, produced for real through the command line."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner

import troubleshooting
from manta.cli import main
from manta.config import Config
from manta.lease import Lease
from manta.runs import Run, checkpoint_path
from running import MODEL_AND_DATA, write_rows
from served import run_over
from tiny import tiny_model, tiny_tokenizer
from troubleshooting import check

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the verbs would work, and broken things beside."""
    folder = tmp_path_factory.mktemp("wrong")
    base = Path(tiny_model(folder / "base"))
    rows = write_rows(folder / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, settings in (
        ("coded", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "m.M"}}),
        ("newer", {"model_type": "qwen99"}),
        ("encoder", {"model_type": "t5"}),
    ):
        copied(base, name, config=settings)
    cut = copied(base, "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    pickled = copied(base, "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    tiny_tokenizer(copied(base, "endless"), eos=None)
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "chat.jsonl").write_text(f"{json.dumps(turns)}\n" * 50)
    (folder / "cut.jsonl").write_text("".join([*rows, *(row[:20] + "\n" for row in rows[:8])]))
    (folder / "three.jsonl").write_text("".join(rows[:3]))
    (folder / "open.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    (folder / "typo.yaml").write_text("max_steps: 10\nlearning_rat: 1.0e-4\n")
    (folder / "colon.yaml").write_text("max_steps: 10\nlearning_rate 1.0e-4\nseed: 3\n")
    (folder / "file").write_text("")
    run_over(base, folder / "runs" / "good", 1)
    damaged = run_over(base, folder / "runs" / "damaged", 1)
    weights = checkpoint_path(damaged.path, 10) / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    moved = copied(base, "moved")
    run_over(moved, folder / "runs" / "orphan", 1)
    moved.rename(folder / "elsewhere")
    return folder


def copied(base: Path, name: str, config: dict[str, Any] | None = None) -> Path:
    """The model under another name, with other settings in its config.json."""
    folder = Path(shutil.copytree(base, base.with_name(name)))
    about = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_ADDRESS", "WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(made)
    return made


def flags(verb: str, settings: dict[str, str]) -> list[str]:
    good = MODEL_AND_DATA if verb in ("train", "prepare") and "resume" not in settings else {}
    return [verb, *(f"--{name}={value}" for name, value in (good | settings).items())]


def said(verb: str, *more: str, **settings: str) -> tuple[str, int]:
    """What `manta` prints to standard error in this process, and its exit code."""
    done = CliRunner().invoke(main, [*flags(verb, settings), *more])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.stdout == ""
    return done.stderr, done.exit_code


def typed(folder: Path, verb: str, environment: dict[str, str] | None = None, **settings: str) -> tuple[str, int]:
    """The same in a process of its own, with the hub as a user has it, and without a GPU."""
    left_out = ("HF_HUB_OFFLINE", "HF_TOKEN", "RAY_ADDRESS")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [sys.executable, "-m", "manta", *flags(verb, settings)],
        cwd=folder,
        env=inherited | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "home")} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.stdout == ""
    return done.stderr, done.returncode


def test_every_error_of_the_page_has_a_test_and_the_other_way_round():
    headings = [line[4:] for line in troubleshooting.PAGE.read_text().splitlines() if line.startswith("### ")]
    produced: set[str] = set()
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        if any(isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check" for node in nodes):
            produced |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(SETTINGS) <= set(headings) <= produced
    assert set(headings) == set(troubleshooting.entries()), "an entry is not of the page's form"
    assert len(headings) == len(set(headings)) >= 40
    assert all(len(entry.about.split()) >= 6 for entry in troubleshooting.entries().values())


# What one command's settings are enough for: title → verb and settings.
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "A flag is misspelt": ("train", {"learning_rat": "1e-4"}),
    "A number is none": ("train", {"learning_rate": "1e-4x"}),
    "A setting in the recipe is misspelt": ("train", {"config": "typo.yaml"}),
    "The recipe is not YAML": ("train", {"config": "colon.yaml"}),
    "The model's folder is not there": ("train", {"hf_model_id": "./bass"}),
    "The model comes with code of its own": ("train", {"hf_model_id": "coded"}),
    "transformers does not know the model": ("train", {"hf_model_id": "newer"}),
    "The model does not generate text": ("train", {"hf_model_id": "encoder"}),
    "A weights file is damaged": ("train", {"hf_model_id": "cut"}),
    "The weights are pickles": ("train", {"hf_model_id": "pickled"}),
    "LoRA's target modules are not in the model": ("train", {"lora_target_modules": "q_proj,qkv"}),
    "Sequences are longer than the model's": ("train", {"max_seq_length": "4096"}),
    "FlashAttention is not installed": ("train", {"attn_implementation": "flash_attention_2"}),
    "The optimizer needs a package": ("train", {"optim": "adamw_8bit"}),
    "The optimizer is not known": ("train", {"optim": "adamw"}),
    "The tokenizer has no EOS": ("prepare", {"hf_model_id": "endless"}),
    "The tokenizer has no chat template": ("train", {"hfdc_dataset_name": "chat.jsonl", "hfdc_format": "messages"}),
    "The data file is not there": ("prepare", {"hfdc_dataset_name": "./row.jsonl"}),
    "A template names a column that is not there": ("prepare", {"hfdc_input_template": "{qestion}"}),
    "Too many rows are broken": ("prepare", {"hfdc_dataset_name": "cut.jsonl"}),
    "Nothing is left to train on": ("prepare", {"max_seq_length": "8"}),
    "There are no validation rows": ("prepare", {"hfdc_dataset_name": "three.jsonl"}),
    "The folder of results cannot be written": ("train", {"results_dir": "file"}),
    "A store's package is missing": ("train", {"results_dir": "gs://bucket/runs"}),
    "There is no GPU": ("train", {"device": "cuda"}),
    "wandb is not installed": ("train", {"report_to": "wandb"}),
    "Settings changed since the run began": ("train", {"resume": "runs/good", "learning_rate": "0.1"}),
    "That is no run": ("evaluate", {"run": "file"}),
    "No checkpoint is whole": ("convert", {"run": "runs/damaged"}),
    "The base model of a run is gone": ("convert", {"run": "runs/orphan"}),
    "vLLM is not installed": ("serve", {"model": "base", "engine": "vllm"}),
    "A server open to others has no key": ("serve", {"model": "base", "host": "0.0.0.0"}),
    "No server answers": ("chat", {"url": "http://127.0.0.1:9"}),
    "A job's results would be lost": ("launch", {"config": "job"}),
}


@pytest.mark.parametrize("title", SETTINGS)
def test_settings_are_enough_for(folder, title):
    verb, settings = SETTINGS[title]
    if verb == "launch":
        printed = said("launch", "kubernetes", "--dry_run", "--image", "i", "--results_dir", "results")
    else:
        printed = said(verb, *(["hi"] if verb == "chat" else []), **settings)
    print(*printed)
    check(title, *printed)


# --- The hub, over real HTTP: a server with its status codes and headers, spoken to by the real client.

STRANGER, EXPIRED = "hf_ofSomebodyWithoutAccess", "hf_ofYesterday"


class Refusing(BaseHTTPRequestHandler):
    """As huggingface.co answers for acme/gated, and for what is not there."""

    def do_GET(self) -> None:
        token, gated = self.headers.get("Authorization"), "acme/gated" in self.path
        if token not in (None, f"Bearer {STRANGER}"):
            status, code, message = 401, None, "Invalid credentials in Authorization header"
        elif not gated:
            status, code, message = (401 if token is None else 404), "RepoNotFound", "Repository not found"
        elif token is None:
            status, code, message = 401, "GatedRepo", "Access to model acme/gated is restricted. Please log in."
        else:
            status, code, message = 403, "GatedRepo", "Access to model acme/gated is restricted."
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Error-Message", message), ("Content-Length", "0")):
            if value:
                self.send_header(name, value)
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


def test_what_the_hub_refuses_and_that_it_is_out_of_reach(folder, hub):
    """All at once: the client asks a hub that is away again and again for half a minute."""
    asked = {
        "The hub cannot be reached": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "acme/model"),
        "The model is gated": (hub, "acme/gated"),
        "The model is gated, and your token has no access": (hub | {"HF_TOKEN": STRANGER}, "acme/gated"),
        "The hub does not know your token": (hub | {"HF_TOKEN": EXPIRED}, "acme/gated"),
        "The hub has no such model": (hub, "acme/none"),
    }
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = {
            title: pool.submit(typed, folder, "train", environment, hf_model_id=name)
            for title, (environment, name) in asked.items()
        }
    for title, answer in answers.items():
        printed, code = answer.result()
        check(title, printed, code)
        assert STRANGER not in printed and EXPIRED not in printed


def test_a_push_without_a_token(folder):
    check("There is no token to push with", *typed(folder, "convert", run="runs/good", push_to_hub="me/tuned"))


# --- Places


def test_a_disk_that_is_full(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize)
        check("The disk is full", *said("prepare", data_dir=str(disk / "prepared")))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_store_without_credentials(folder, tmp_path, monkeypatch):
    import fsspec

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # clients of an earlier server
    check("There are no credentials for the store", *said("train", results_dir="s3://bucket/runs"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


# --- Data, runs, trackers, servers


def test_a_template_after_which_answers_do_not_end(folder):
    settings = {"hfdc_dataset_name": "chat.jsonl", "hfdc_format": "messages", "chat_template": "open.jinja"}
    printed, code = said_with_output("prepare", **settings)
    assert code == 0 and "stop_not_trained" in printed
    check("The chat template does not end answers", *said("train", **settings))


def said_with_output(verb: str, **settings: str) -> tuple[str, int]:
    done = CliRunner().invoke(main, flags(verb, settings))
    return done.output, done.exit_code


def test_a_run_that_another_driver_has(folder):
    with Lease(Run(folder / "runs" / "good")):
        check("Another driver has the run", *said("train", resume="runs/good"))


def test_wandb_without_a_key(folder, tmp_path, monkeypatch):
    """A stand-in for the package, which is not installed here: only whether it can be found is looked at."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    check("wandb has no key", *said("train", use_wandb="true"))


def test_a_port_that_is_taken(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check("The port is taken", *said("serve", model="base", port=str(taken.getsockname()[1])))


def test_a_server_that_wants_a_key(folder):
    from manta.serving import chat
    from manta.serving.catalog import catalog

    with chat.local(catalog((), ("base",)), "cpu", "float32") as talker:
        check("The server wants a key", *said("chat", "hi", url=str(talker.client.base_url)))


# --- What needs a GPU: the real exception, or the real answer of one, through the rooms that judge them.


def test_a_gpu_that_is_out_of_memory():
    """The class that torch's allocator raises, with its text, as a worker and the mailbox judge it."""
    import torch

    from manta import diagnosis
    from manta.attempts import Attempts, Policy

    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.02 GiB is "
        "free. Including non-PyTorch memory, this process has 22.65 GiB memory in use."
    )
    assert diagnosis.is_out_of_memory(error)
    judge = Attempts(Policy(2, 100, rows=1, halve=True))
    judge.begin(0, ["node"], ["node"])
    judge.entered_loop()
    judge.report("out_of_memory", f"rank 0: {str(error).splitlines()[0]}")
    check("A GPU is out of memory", judge.failed(1, "error", "OutOfMemoryError") or "")
    check("Out of memory outside of training", f"manta: {diagnosis.explain(error)}")


def test_a_gpu_without_bfloat16():
    from manta.errors import UserError
    from manta.model import compute_dtype

    with pytest.raises(UserError) as caught:
        compute_dtype(Config(dtype="bfloat16"), native=False, device="cuda")
    check("The GPU has no bfloat16", str(caught.value))
