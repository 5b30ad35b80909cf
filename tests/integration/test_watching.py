"""One real run on two workers, looked at from outside: killed once, stopped by a signal, and gone on with."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from manta.outcome import ASKED_TO_STOP
from manta.quiet import DRIVER_LOG
from manta.runs import Run
from ports import free_ports
from running import CANARY, lines, small_config

pytestmark = pytest.mark.slow

MANTA = [sys.executable, "-m", "manta"]
STEPS, KILLED_AT, STOPPED_AT = 400, 16, 28


@dataclass
class Seen:
    """What a run looked like to everybody; `scrapes` before the kill, and after it."""

    run: Run
    result: dict[str, Any]
    progress: dict[str, Any]
    driver: subprocess.CompletedProcess[str]
    watcher: subprocess.CompletedProcess[str]
    on_terminal: str
    terminal_code: int
    told: list[dict[str, Any]]
    scrapes: list[dict[tuple[str, ...], float]] = field(default_factory=list)


class Hook(ThreadingHTTPServer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Keeping)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class _Keeping(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


def scrape(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels.pop("run") for sample in samples} == {"seen"}
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def until(condition: Callable[[], Any], driver: subprocess.Popen[str]) -> Any:
    limit = time.monotonic() + 240
    while not (found := condition()):
        assert driver.poll() is None and time.monotonic() < limit, f"it does not happen; exit code {driver.poll()}"
        time.sleep(0.05)
    return found


def attempts(run: Run) -> list[dict[str, Any]]:
    return [event for event in lines(run.events_file) if event["kind"] == "attempt"]


def last_step(run: Run, attempt: int) -> int:
    return max((line["step"] for line in lines(run.metrics_file) if line["attempt"] == attempt), default=0)


def saved(run: Run) -> bool:
    return any(event["kind"] == "checkpoint" for event in lines(run.events_file))


@contextlib.contextmanager
def terminal(command: list[str]) -> Any:
    """`command` on a terminal of its own; yields its process and a list of what it showed."""
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how a terminal ends
            while data := os.read(ours, 65536):
                shown.append(data)

    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield process, shown
        process.wait(60)
    finally:
        process.kill()
        reader.join(10)
        os.close(ours)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("watching")
    config = small_config(folder, run_name="seen", max_steps=STEPS, eval_steps=10, save_steps=10, step_copies="every")
    (folder / "recipe.yaml").write_text(config.dump())
    return [*MANTA, "train", "--config", str(folder / "recipe.yaml")]


@pytest.fixture(scope="module")
def seen(command: list[str]) -> Seen:
    folder = Path(command[-1]).parent
    run, hook = Run(folder / "results" / "seen"), Hook()
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    (port,) = free_ports(1)
    flags = ["--metrics_port", str(port), "--notify", hook.url]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    watching = [*MANTA, "runs", "watch", str(run.path), "--wait"]
    environment = {**os.environ, "HF_TOKEN": CANARY}
    driver = subprocess.Popen([*command, *flags], env=environment, start_new_session=True, **pipes)
    try:
        watcher = subprocess.Popen(watching, **pipes)
        with terminal(watching) as (on_terminal, shown):
            until(lambda: last_step(run, 1) >= KILLED_AT and saved(run), driver)
            scrapes = [scrape(port)]
            os.kill(attempts(run)[0]["workers"][1]["pid"], signal.SIGKILL)
            until(lambda: last_step(run, 2) >= STOPPED_AT, driver)
            scrapes.append(scrape(port))
            driver.terminate()
            out, err = driver.communicate(timeout=120)
            looked = watcher.communicate(timeout=60)
    finally:
        for process in (driver, watcher):
            process.kill()
        hook.shutdown()
    return Seen(
        run,
        run.result() or {},
        json.loads(run.progress_file.read_text()),
        subprocess.CompletedProcess([], driver.returncode, out, err),
        subprocess.CompletedProcess([], watcher.returncode, *looked),
        b"".join(shown).decode(),
        on_terminal.returncode,
        hook.told,
        scrapes,
    )


def test_watchers_see_what_the_driver_shows_and_end_with_it(seen):
    codes = (seen.driver.returncode, seen.watcher.returncode, seen.terminal_code)
    assert codes == (ASKED_TO_STOP,) * 3, seen.driver.stderr
    assert seen.watcher.stdout == seen.driver.stdout and "stopped" in seen.driver.stdout
    start = attempts(seen.run)[1]["step"]
    for shown in (seen.watcher.stderr, seen.on_terminal):
        assert "attempt 1 ended, worker: the process of rank 1 died" in shown
        assert f"seen: attempt 2 goes on from step {start}" in shown
        assert re.search(
            r"loss \d\.\d{4}  eval \d\.\d{4}  lr \d\.\d\de-\d\d  [\d,]+ tok/s  2 workers  attempt 2", shown
        )
    assert re.search(rf"seen: step \d+/{STEPS}  loss .*  ETA \d:\d\d:\d\d\n", seen.watcher.stderr)
    assert "\x1b[" not in seen.watcher.stderr and "\x1b[2K" in seen.on_terminal


def test_no_step_is_counted_twice_by_who_watches_over_a_restart(seen):
    """Steps rise, and fall once at most, no further than to where the second attempt began."""
    steps = [int(step) for step in re.findall(r"seen: step (\d+)/", seen.watcher.stderr)]
    final = seen.progress
    assert final["state"] == "stopped" and final["step"] == seen.result["steps"] == max(steps) == steps[-1] < STEPS
    falls = [after for before, after in itertools.pairwise(steps) if after < before]
    assert len(falls) <= 1 and all(step >= attempts(seen.run)[1]["step"] for step in falls)


def test_prometheus_sees_the_run_go_on(seen):
    before, after = seen.scrapes
    assert KILLED_AT <= before["manta_train_step",] < after["manta_train_step",] < STEPS
    for scraped in (before, after):
        assert scraped["manta_train_state", "training"] == 1 and scraped["manta_train_max_steps",] == STEPS
        assert scraped["manta_train_workers",] == 2 and scraped["manta_train_checkpoint_step",] % 10 == 0
        assert 0 < time.time() - scraped["manta_train_checkpoint_timestamp_seconds",] < 600
        step = scraped["manta_train_step",]
        logged = [line for line in lines(seen.run.metrics_file) if "loss" in line]
        near = [line for line in logged if abs(line["step"] - step) <= 1]
        for name in ("loss", "learning_rate", "grad_norm"):
            assert scraped[f"manta_train_{name}",] in [line[name] for line in near]
        assert scraped["manta_train_eval", "eval_loss"] > 0 and scraped["manta_train_tokens_per_second",] > 0
    assert (before["manta_train_restarts_total",], after["manta_train_restarts_total",]) == (0, 1)
    assert after["manta_train_tokens_total",] > before["manta_train_tokens_total",] > 0


def test_the_hook_hears_of_the_restart_and_the_stop(seen):
    assert [told["event"] for told in seen.told] == ["restarted", "stopped"]
    restarted, stopped = seen.told
    assert restarted["cause"] == "worker" and "the process of rank 1 died" in restarted["text"]
    assert restarted["step"] == attempts(seen.run)[1]["step"]
    assert stopped["result"] == seen.result and stopped["path"] == str(seen.run.path)
    assert CANARY not in json.dumps(seen.told)


def test_the_terminal_is_quiet_and_the_logs_have_the_rest(seen):
    """Ray's own paragraph about the killed worker too, which it prints whatever it is told."""
    printed = seen.driver.stdout + seen.driver.stderr
    for noise in ("Warning", "raylet", "%|", "Traceback", "INFO", "\x1b["):
        assert noise not in printed
    said = seen.driver.stderr.splitlines()
    wanted = ("train: ", "prepare: ", "warning: boundary_split", "Page: ")
    assert [line for line in said if not line.startswith(wanted)] == []
    events = [line for line in said if line.startswith("train: ") and not line.startswith("train: step ")]
    assert 3 <= len(events) == len(set(events)) <= 4, events  # the setup, why the workers ended, where others went on
    assert len(said) <= 40 and len(seen.driver.stdout.splitlines()) <= 12
    assert "A worker died" in (seen.run.logs / DRIVER_LOG).read_text()
    assert "'loss'" in (seen.run.logs / "worker-00000.log").read_text()
    assert (seen.run.logs / "worker-00001.log").stat().st_size > 0


def test_verbose_shows_the_rest_and_a_hook_that_hangs_holds_up_nothing(command):
    run = Run(Path(command[-1]).parent / "results" / "loud")
    more = ["--run_name", run.name, "--verbose", "--notify", "sleep 3600", "--stop_at_step", "4"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = run.result()
    assert (result["steps"], result["status"], result["asked_to_stop"]) == (4, "stopped", False)
    printed = done.stdout + done.stderr
    assert "(RayTrainWorker" in printed and "'loss'" in printed
    assert "'loss'" in (run.logs / "worker-00000.log").read_text()  # there as well
    assert done.stderr.count("--notify does not work: the command took longer than") == 1
