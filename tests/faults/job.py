"""A `manta train` as a user runs it, in a process of its own: started, watched through what it writes, and hurt."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from manta.config import Config
from manta.runs import Run
from running import CANARY, lines

MARK = "MANTA_FAULTS_JOB"  # in the environment of every process of a job, by which they are found again
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
Found = TypeVar("Found")


class Job:
    """One run and the commands that train it. Inside the `with` block it may run; after it, no process is left."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        self.run = Run(Path(config.results_dir) / str(config.run_name))
        self.mark = uuid.uuid4().hex
        self.ray_folder = Path(tempfile.mkdtemp(prefix="mf"))  # short: it holds Ray's sockets
        self.output = folder / f"{self.run.name}.out"
        self.driver: subprocess.Popen[bytes] | None = None
        recipe = folder / f"{self.run.name}.yaml"
        recipe.write_text(config.dump())
        self.command = [sys.executable, "-m", "manta", "train", "--config", str(recipe)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            **dict.fromkeys(SECRETS, CANARY),
            **marks(self.mark),
            "RAY_TMPDIR": str(self.ray_folder),
            "CUDA_VISIBLE_DEVICES": "",
            "RAY_worker_niceness": "0",  # Ray's is 15: on a busy machine everybody else would come first
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        kill_marked(self.mark)
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    # --- The driver

    def start(self, *flags: str) -> None:
        """The command, or the same command again."""
        with self.output.open("ab") as output:
            self.driver = subprocess.Popen(
                [*self.command, *flags],
                cwd=self.folder,
                env=self.environment,
                start_new_session=True,
                stdout=output,
                stderr=output,
            )

    def again(self, *flags: str, limit: float = 120) -> subprocess.CompletedProcess[str]:
        """The same command beside the first one, to its end."""
        return subprocess.run(
            [*self.command, *flags],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )

    def kill_driver(self) -> float:
        assert self.driver is not None
        now = time.time()
        self.driver.kill()
        self.driver.wait()
        return now

    def wait(self, limit: float) -> int:
        """The exit code of the driver. Raises TimeoutExpired, and then the driver is killed."""
        assert self.driver is not None
        try:
            return self.driver.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill_driver()
            kill_marked(self.mark)
            raise

    def finish(self, limit: float = 180) -> None:
        """Wait for the end of the run. Raises RuntimeError if it does not end well."""
        if (code := self.wait(limit)) != 0:
            raise RuntimeError(f"the command exits with {code}: {self.said(300)}")

    def ensure_running(self) -> None:
        """Give the same command again if the driver is gone, and wait until steps are done."""
        if self.driver is None or self.driver.poll() is not None:
            before = time.time()
            self.start()
            self.until(lambda: self.losses() and self.losses()[-1]["time"] > before, 150)

    def said(self, characters: int = 2000) -> str:
        """The end of what the driver printed."""
        return self.output.read_text(errors="replace")[-characters:] if self.output.exists() else ""

    # --- What it writes

    def losses(self) -> list[dict[str, Any]]:
        return [line for line in lines(self.run.metrics_file) if "loss" in line]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in lines(self.run.events_file) if event["kind"] == kind]

    def notes(self) -> list[str]:
        return [event["text"] for event in self.events("note")]

    def step(self) -> int:
        return self.losses()[-1]["step"] if self.losses() else 0

    def worker(self, rank: int) -> int:
        """The process of a rank in the newest attempt."""
        return self.events("attempt")[-1]["workers"][rank]["pid"]

    def until(self, what: Callable[[], Found], limit: float, pause: float = 0.02) -> Found:
        """Look again and again until there is something. Raises TimeoutError, or RuntimeError if the driver is gone."""
        end = time.monotonic() + limit
        while not (found := what()):
            if self.driver is not None and self.driver.poll() is not None and not (found := what()):
                raise RuntimeError(f"the driver exits with {self.driver.returncode}: {self.said(300)}")
            if time.monotonic() > end:
                raise TimeoutError(f"nothing for {limit:.0f} s; step {self.step()}, {self.said(200)!r}")
            time.sleep(pause)
        return found

    def steps_more(self, count: int, limit: float = 90) -> int:
        """Wait until so many more steps are logged; the step that then was."""
        wanted = self.step() + count
        self.until(lambda: self.step() >= wanted, limit)
        return self.step()

    def recovery(self, since: float, limit: float = 90) -> tuple[int, float]:
        """Wait for the first new step after a fault at `since`: wasted steps, and seconds to it."""
        before = [event["attempt"] for event in self.events("attempt") if event["time"] <= since]
        last = max(before, default=0)
        new = self.until(lambda: next((line for line in self.losses() if line["attempt"] > last), None), limit)
        start = next(event["step"] for event in self.events("attempt") if event["attempt"] == new["attempt"])
        done = max((line["step"] for line in self.losses() if line["attempt"] <= last), default=0)
        return max(0, done - start), new["time"] - since

    def freeze_in_save(self, limit: float = 60) -> list[int]:
        """Stop all workers in the middle of a save, by SIGSTOP; returns their processes.

        Looked at again after they stand still: only a folder that then has no manifest is in the middle.
        """
        pids = [worker["pid"] for worker in self.events("attempt")[-1]["workers"]]
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if not self.unfinished():
                time.sleep(0.001)
                continue
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            if self.unfinished():
                return pids
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.2)
        raise TimeoutError(f"no save was met in {limit:.0f} s")

    def unfinished(self) -> list[Path]:
        """Checkpoints without a manifest."""
        return [path for path in self.run.path.glob("checkpoint_*[0-9]") if not (path / "manifest.json").exists()]

    def scan(self) -> list[str]:
        """Files of the run, its logs, Ray's session, and this job's output that hold the canary secret."""
        found = []
        for folder in (self.run.path, self.ray_folder, self.output):
            for path in folder.rglob("*") if folder.is_dir() else [folder]:
                with contextlib.suppress(OSError):
                    if path.is_file() and CANARY.encode() in path.read_bytes():
                        found.append(str(path))
        return found


def marks(mark: str) -> dict[str, str]:
    """Variables by which `marked` finds a process, and those that it starts.

    Without the second, a process of Ray's that gives itself a name writes over its environment.
    """
    return {MARK: mark, "SPT_NOENV": "1"}


def marked(mark: str) -> list[psutil.Process]:
    """Processes that have `mark` in their environment, other than this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def kill_marked(mark: str) -> None:
    """End every process of a job, also stopped ones, and those they leave."""
    for _ in range(5):
        if not (left := marked(mark)):
            return
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
