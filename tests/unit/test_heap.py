"""One heap for all threads of a process that trains, in whose holes tensors fit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from heaps import HAS_ONE_HEAP
from manta import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other heaps")

UNITE = "from manta import heap\nheap.unite()\n"


@pytest.mark.parametrize(
    ("variables", "first", "shared"),
    [
        ({}, "", "False"),  # as glibc has it
        ({heap.ARENAS: heap.variables()[heap.ARENAS]}, "", "True"),
        ({}, UNITE, "True"),
        ({heap.ARENAS: "2"}, UNITE, "False"),  # said by the user
    ],
)
def test_threads_share_a_heap_where_nothing_else_is_said(variables, first, shared):
    assert run("-c", f"{first}{HAS_ONE_HEAP}\nprint(has_one_heap())", **variables) == shared


def test_what_the_user_said_of_heaps_reaches_the_workers(monkeypatch):
    for name in (heap.ARENAS, heap.TUNABLES):
        monkeypatch.delenv(name, raising=False)
    ours = heap.variables()
    assert ours[heap.ARENAS] == "1" and "tcache_count=0" in ours[heap.TUNABLES]
    theirs = {heap.ARENAS: "4", heap.TUNABLES: "glibc.malloc.perturb=1"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    assert heap.variables() == theirs


def run(*arguments: str, **variables: str) -> str:
    """What Python prints, told of heaps only what `variables` say."""
    names = (heap.ARENAS, heap.TUNABLES)
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


STEPS = """
import ctypes, torch
from transformers import LlamaConfig, LlamaForCausalLM
from manta import activations, heap, model
from manta.config import Config

heap.unite()
shape = dict(hidden_size=192, intermediate_size=512, num_attention_heads=3, num_hidden_layers=12, vocab_size=64)
config = Config(hf_model_id="none", device="cpu", lora_dropout=0.1, lora_target_modules="all-linear")
network = model.adapted(LlamaForCausalLM(LlamaConfig(**shape)), config, model.Placement(torch.device("cpu"))).train()
activations.recompute(network, "none")
library = ctypes.CDLL(None)
library.mallinfo2.restype = heap._Info
before, ids = library.mallinfo2().arena, torch.zeros(1, 1024, dtype=torch.long)
for _ in range(4):
    network(input_ids=ids, labels=ids).loss.backward()
print(library.mallinfo2().arena - before)
"""


@pytest.mark.skipif(not heap.keeps_remainders(), reason="glibc 2.39 and later fill these holes themselves")
def test_the_heap_grows_less_where_tensors_fit_into_the_holes_that_others_leave():
    assert int(run("-c", STEPS, **heap.variables())) < 0.85 * int(run("-c", STEPS))


BEGIN = """
import os, sys
from manta import heap
print(os.getpid(), flush=True)
heap.begin_again()
started = open("/proc/self/environ").read()
print(os.getpid(), sys.argv[1:], heap.TUNABLES in started, heap.TUNABLES in os.environ)
"""


@pytest.mark.skipif(not heap.keeps_remainders(), reason="glibc 2.39 and later fill these holes themselves")
def test_a_process_begins_again_once_and_what_it_starts_is_as_usual(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BEGIN)
    command = [str(script), "train", "--run_name", "a b"]
    first, again, last = run(*command).splitlines()
    assert first == again and last == f"{first} ['train', '--run_name', 'a b'] True False"
    first, last = run(*command, **{heap.TUNABLES: "glibc.malloc.perturb=1"}).splitlines()  # said by the user
    assert last == f"{first} ['train', '--run_name', 'a b'] True True"
