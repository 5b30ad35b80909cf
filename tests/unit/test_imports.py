"""Imports without the garbage collector, and the end of a process that had many."""

from __future__ import annotations

import gc
import subprocess
import sys
import time

import pytest

from manta import imports

PLAIN = "from transformers import Trainer; import peft"
QUICK = f"from manta import imports\nwith imports.quickly():\n    {PLAIN}"


def seconds_to_end(program: str) -> float:
    program += "\nimport time; print(time.time())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return time.time() - float(done.stdout)


@pytest.mark.slow
def test_a_process_with_many_imports_ends_at_once():
    """In turns, the quickest of two each: other processes may be using the machine."""
    plain, quick = zip(*((seconds_to_end(PLAIN), seconds_to_end(QUICK)) for _ in range(2)), strict=True)
    assert min(quick) < 0.6 * min(plain)


def test_the_collector_works_on_and_what_is_there_is_frozen_for_imports_alone():
    frozen = gc.get_freeze_count()
    with imports.quickly():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen  # nothing was imported: a user's garbage stays garbage
    try:
        with imports.quickly():
            sys.modules["this_is_new"] = sys
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        del sys.modules["this_is_new"]
        gc.unfreeze()
