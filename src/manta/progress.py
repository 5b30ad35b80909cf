"""How a run tells what it does: workers send to one actor, the driver drains it, writes files and shows one display.

A side channel on purpose: `ray.train.report` is collective and costs up to two seconds a call.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, ClassVar, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from manta import manifest
from manta.storage import is_remote

NAMESPACE = "manta"
_POLL_S = 0.25
_PLAIN_EVERY_S = 5.0
REWRITE_S = 5.0
_REWRITTEN_PER_S = 1 << 20  # bytes of a remote file


class Mailbox:
    """Ray actor on the driver's node: a queue of messages, and the count of attempts."""

    def __init__(self, attempts: int) -> None:
        self.messages: list[dict[str, Any]] = []
        self.attempts = attempts  # of earlier drivers of the same run
        self.stop_wanted = False

    def begin_attempt(self) -> int:
        """Called by rank 0 of every new worker group; returns its number, from 1."""
        self.attempts += 1
        return self.attempts

    def want_stop(self) -> None:
        """Called by the driver that was asked to end."""
        self.stop_wanted = True

    def is_stop_wanted(self) -> bool:
        return self.stop_wanted

    def put(self, message: dict[str, Any]) -> None:
        self.messages.append({"time": time.time(), **message})

    def drain(self) -> list[dict[str, Any]]:
        drained, self.messages = self.messages, []
        return drained


def open_mailbox(attempts: int) -> tuple[Any, str]:
    """A mailbox by the driver, for a run that has had `attempts` already, and its name; it ends with its handle."""
    import ray

    name = f"mailbox-{uuid.uuid4().hex}"
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "label_selector": here}
    return ray.remote(Mailbox).options(**options).remote(attempts), name


def find_mailbox(name: str | None) -> Any | None:
    """The mailbox of that name, or None where nobody listens (a train function run outside `manta train`)."""
    import ray

    return ray.get_actor(name, namespace=NAMESPACE) if name else None


class Monitor:
    """Drains a mailbox in a thread of the driver: events.jsonl, metrics.jsonl, and the display."""

    def __init__(self, mailbox: Any, events: Path, metrics: Path, display: Display):
        self.mailbox, self.display = mailbox, display
        self.events, self.metrics = JsonLines(events), JsonLines(metrics)
        self.tokens = self.tokens_timed = 0  # the latter without the first step, which includes warming up
        self.first_step_time: float | None = None
        self.last_step_time: float | None = None
        self.stop_wanted = threading.Event()  # set by a signal handler, which must not call Ray itself
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-monitor", daemon=True)

    def __enter__(self) -> Self:
        self.events.open()
        self.metrics.open()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.events.close()
        self.metrics.close()

    def _run(self) -> None:
        passed_on = False
        while not self._stop.wait(_POLL_S):
            if self.stop_wanted.is_set() and not passed_on:
                self.mailbox.want_stop.remote()
                passed_on = True
            self._drain()
        self._drain()

    def _drain(self) -> None:
        import ray

        try:
            messages = ray.get(self.mailbox.drain.remote(), timeout=30)
        except ray.exceptions.RayError:
            return  # a lost display never ends a run
        for message in messages:
            self._take(message)
        for log in (self.events, self.metrics):
            if problem := log.flush():
                self.display.note(problem)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "step":
            self.tokens += message["tokens"]
            if self.first_step_time is None:
                self.first_step_time = message["time"]
            else:
                self.tokens_timed += message["tokens"]
            self.last_step_time = message["time"]
        elif kind == "log":
            self.metrics.add(message)
        else:
            self.events.add(message)
        self.display.take(message)


class Display:
    """A live bar with figures below it on a terminal; a plain line every few seconds in a file or a pipe."""

    def __init__(self, title: str, total_steps: int, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, highlight=False)
        self.total = total_steps
        self.figures: dict[str, Any] = {}
        self.recent: list[tuple[float, int]] = []
        self.last_plain = 0.0
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task(title, total=total_steps)
        self.live = Live(get_renderable=self._render, console=self.console) if self.console.is_terminal else None
        self.title = title

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def take(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "step":
            self.recent.append((message["time"], message["tokens"]))
            self.recent = [entry for entry in self.recent if entry[0] > message["time"] - 10]
            self.figures["step"] = max(message["step"], self.figures.get("step", 0))
        elif kind == "log":
            self.figures |= {key: message[key] for key in ("loss", "eval_loss", "learning_rate") if key in message}
        elif kind == "attempt":
            self.figures["workers"] = message["world_size"]
            self.figures["step"] = message["step"]
            if message["attempt"] > 1 or message["step"]:
                self.note(f"attempt {message['attempt']} goes on from step {message['step']}")
        elif kind == "note":
            self.note(message["text"])
        self._show(force=kind == "log" and "eval_loss" in message)

    def note(self, text: str) -> None:
        say(self.console, f"{self.title}: {text}")

    def _show(self, force: bool) -> None:
        step = self.figures.get("step", 0)
        line = self._line()
        self.bar.update(self.task, completed=step)
        now = time.monotonic()
        if not self.live and line and (force or now - self.last_plain >= _PLAIN_EVERY_S):
            self.last_plain = now
            say(self.console, f"{self.title}: step {step}/{self.total}  {line}")

    def _render(self) -> RenderableType:
        return Group(self.bar, Text(f"  {self._line() or 'starting workers'}"))

    def _line(self) -> str:
        parts = [
            f"{label} {self.figures[key]:{form}}"
            for key, label, form in (
                ("loss", "loss", ".4f"),
                ("eval_loss", "eval", ".4f"),
                ("learning_rate", "lr", ".2e"),
            )
            if key in self.figures
        ]
        if len(self.recent) > 1 and (seconds := self.recent[-1][0] - self.recent[0][0]) > 0:
            parts.append(f"{sum(tokens for _, tokens in self.recent[1:]) / seconds:,.0f} tok/s")
        if "workers" in self.figures:
            count = self.figures["workers"]
            parts.append(f"{count} worker{'s' if count > 1 else ''}")
        return "  ".join(parts)


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(text, markup=False, soft_wrap=True)


class JsonLines:
    """Lines added to a file. What cannot be written now, on a full disk or a failing store, is kept for the next time.

    A store has no appending: there the file is written anew, every REWRITE_S and the less often the longer it is.
    """

    _opened: ClassVar[dict[str, JsonLines]] = {}  # so that nobody else rewrites what one holds in memory

    def __init__(self, path: Path):
        self.path = path
        self._lines: list[str] = []
        self._written: str | None = None  # of a remote file
        self._due = 0.0
        self._problem: str | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        self._opened[str(self.path)] = self

    def close(self) -> None:
        self.flush(now=True)
        self._opened.pop(str(self.path), None)

    def add(self, value: dict[str, Any]) -> None:
        with self._lock:
            self._lines.append(json.dumps(value, ensure_ascii=False) + "\n")

    def flush(self, now: bool = False) -> str | None:
        """Write what is due, or all of it `now`; returns what to tell the user, once, if it cannot be written."""
        with self._lock:
            if not self._lines or (not now and time.monotonic() < self._due):
                return None
            try:
                (self._rewrite if is_remote(self.path) else self._append)("".join(self._lines))
            except Exception as error:  # of any client of a store
                self._due = time.monotonic() + REWRITE_S
                told, self._problem = self._problem, f"{self.path} cannot be written just now: {error}"
                return None if told else self._problem
            self._lines, self._problem = [], None
            return None

    def _append(self, text: str) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(text.encode())
                if written < len(text.encode()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)  # half a line would make the file unreadable
                raise

    def _rewrite(self, text: str) -> None:
        if self._written is None:
            try:
                self._written = manifest.read_text(self.path)
            except FileNotFoundError:
                self._written = ""
        whole = self._written + text
        self.path.write_text(whole, encoding="utf-8")
        self._written = whole
        self._due = time.monotonic() + REWRITE_S + len(whole) / _REWRITTEN_PER_S


def append_json(path: Path, value: dict[str, Any]) -> None:
    """Append one line of JSON now, or as soon as it can be written if a monitor has the file open."""
    log = JsonLines._opened.get(str(path)) or JsonLines(path)
    log.add(value)
    log.flush(now=True)
