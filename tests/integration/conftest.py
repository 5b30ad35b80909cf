from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Demo:
    """A finished `manta demo`: where it ran, and what it printed."""

    folder: Path
    output: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo as a user runs it, once per session, in a process and on a Ray of its own."""
    where = tmp_path_factory.mktemp("demo")
    manta = Path(sys.executable).with_name("manta")
    done = subprocess.run([manta, "demo"], cwd=where, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return Demo(where, done.stdout + done.stderr)
