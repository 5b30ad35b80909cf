"""One heap for all threads of a process that trains."""

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
        (heap.one(), "", "True"),
        ({}, UNITE, "True"),
        ({heap.ARENAS: "2"}, UNITE, "False"),  # said by the user
    ],
)
def test_threads_share_a_heap_where_nothing_else_is_said(variables, first, shared):
    code = f"{first}{HAS_ONE_HEAP}\nprint(has_one_heap())"
    environment = {name: value for name, value in os.environ.items() if name != heap.ARENAS} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shared


def test_what_the_user_said_of_heaps_reaches_the_workers(monkeypatch):
    monkeypatch.delenv(heap.ARENAS, raising=False)
    assert heap.one() == {heap.ARENAS: "1"}
    monkeypatch.setenv(heap.ARENAS, "4")
    assert heap.one() == {heap.ARENAS: "4"}
