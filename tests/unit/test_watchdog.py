"""Processes that make no progress are ended, with stacks; those that do are not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(body: str, timeout_s: float = 1) -> subprocess.CompletedProcess[str]:
    program = "import ctypes, time\nfrom manta.watchdog import Watchdog\ndef stuck_here():\n    {}\n"
    program += f"with Watchdog({timeout_s}, None, 0) as watchdog:\n    stuck_here()\nprint('through')\n"
    program = program.replace("{}", textwrap.indent(textwrap.dedent(body), "    ").strip())
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("time.sleep(50)", 70, "manta: no progress for 1 s"),
        ("ctypes.PyDLL(None).sleep(50)", 1, "Timeout (0:00:01"),  # holds the interpreter's lock: no thread of ours runs
    ],
)
def test_a_hang_ends_with_stacks(body, code, said):
    ended = run(f"watchdog.progress(); time.sleep(0.6)\n{body}")
    assert ended.returncode == code and "through" not in ended.stdout
    assert said in ended.stderr and "in stuck_here" in ended.stderr


def test_progress_keeps_it_quiet():
    ended = run("for _ in range(15): time.sleep(0.2); watchdog.progress()")
    assert ended.returncode == 0 and "through" in ended.stdout and ended.stderr == ""


def test_without_a_limit_nothing_watches():
    ended = run("time.sleep(1)", timeout_s=0)
    assert ended.returncode == 0 and "through" in ended.stdout
