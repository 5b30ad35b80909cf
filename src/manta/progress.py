"""How a run tells what it does: workers send to one actor, the driver drains it, writes files and shows one display.

A side channel on purpose: `ray.train.report` is collective and costs up to two seconds a call.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from manta.attempts import Attempts, Cause
from manta.config import GENERATED
from manta.jsonl import JsonLines
from manta.patience import Patience
from manta.runs import METRIC

NAMESPACE = "manta"
_POLL_S = 0.25
_PLAIN_EVERY_S = 5.0


# What all ranks agree on after a step; the larger wins.
GO_ON, SAVE, STOP = 0, 1, 2


class Mailbox:
    """Ray actor on the driver's node: a queue of messages, what workers are asked to do, and the judge of failures."""

    def __init__(self, attempts: Attempts, metric: str, patience: Patience | None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.attempts, self.metric, self.patience = attempts, metric, patience
        self.stop_wanted = self.save_wanted = False
        self.actors: dict[str, tuple[str, Any]] = {}

    def begin_attempt(self, step: int, workers: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
        """Called by rank 0 of every new worker group, which starts from `step`.

        Returns `attempt`, its number from 1, `split`, into how many parts micro-batches are divided, and `stop`, why
        not to go on, or None.
        """
        import ray

        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        stop = self.attempts.begin(step, [worker["node_id"] for worker in workers], alive)
        self._pass_on()
        verdict = {"attempt": self.attempts.number, "split": self.attempts.split, "stop": stop}
        if stop is None:
            self.put(
                {
                    "kind": "attempt",
                    "attempt": verdict["attempt"],
                    "world_size": len(workers),
                    "step": step,
                    "workers": workers,
                    "split": verdict["split"],
                    **about,
                }
            )
        return verdict

    def failed(self, group: int, cause: Cause, text: str) -> str | None:
        """Called by Ray's controller; returns why the run must end, if it must."""
        stop = self.attempts.failed(group, cause, text)
        if not self.attempts.events:  # the cause is judged later, which may take as long as a node is away
            self.put({"kind": "restart", "text": text})
        self._pass_on()
        return stop

    def report(self, cause: Cause, text: str) -> None:
        """Called by a worker right before it ends, so that its silence is understood."""
        self.attempts.report(cause, text)

    def entered_loop(self) -> None:
        self.attempts.entered_loop()

    def preempted(self, nodes: list[str]) -> None:
        self.attempts.preempted(nodes)

    def want_stop(self) -> None:
        """Called by the driver that was asked to end."""
        self.stop_wanted = True

    def validated(self, found: dict[str, Any]) -> None:
        """Called with the figures of a checkpoint's answers; they may end the run."""
        self.put({"kind": "validation", **found})
        if self.patience and self.patience.heard(found[self.metric]) and not self.stop_wanted:
            text = f"stopped early: {self.metric} no longer rose above {self.patience.best:.4f}"
            self.put({"kind": "note", "text": text})
            self.stop_wanted = True

    def want_save(self) -> None:
        self.save_wanted = True

    def wanted(self) -> int:
        """What the workers are asked to do; a save is asked for once."""
        word = STOP if self.stop_wanted else SAVE if self.save_wanted else GO_ON
        self.save_wanted = False
        return word

    def put(self, message: dict[str, Any]) -> None:
        self.messages.append({"time": time.time(), **message})
        if message["kind"] == "step":
            self.attempts.finished(message["step"])
        elif message["kind"] == "checkpoint":
            self.attempts.saved(message["step"])

    def _pass_on(self) -> None:
        events, self.attempts.events = self.attempts.events, []
        for event in events:
            self.put(event)

    def beside(self, nodes: list[str], kind: type) -> dict[str, str]:
        """An actor of class `kind` on each of `nodes`, living as long as the driver: names, also of earlier ones."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in set(nodes) - self.actors.keys():
            name, there = f"{kind.__name__}-{uuid.uuid4().hex}", NodeAffinitySchedulingStrategy(node, soft=False)
            options: Any = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": there}
            self.actors[node] = (name, ray.remote(kind).options(**options).remote())
        return {node: name for node, (name, _) in self.actors.items()}

    def drain(self) -> list[dict[str, Any]]:
        drained, self.messages = self.messages, []
        return drained


def open_mailbox(attempts: Attempts, metric: str = METRIC, patience: Patience | None = None) -> tuple[Any, str]:
    """A mailbox by the driver and its name; it ends with its handle."""
    import ray

    name = f"mailbox-{uuid.uuid4().hex}"
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "label_selector": here}
    return ray.remote(Mailbox).options(**options).remote(attempts, metric, patience), name


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
        self.begun: dict[str, float] = {}  # by phases.BEGUN, of the first workers
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
        # What a killed driver must not take with it: how a checkpoint came about is written with it.
        now = any(message["kind"] in ("attempt", "checkpoint", "validation") for message in messages)
        for log in (self.events, self.metrics):
            if problem := log.flush(now):
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
            self.metrics.add({**message, "tokens": self.tokens})
        elif kind == "begun":
            self.begun = self.begun or message["times"]
        elif kind != "restart":  # what the judged failure will say again
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
        elif kind in ("note", "setup"):
            self.note(message["text"])
        elif kind == "failure":
            self.note(f"attempt {message['attempt']} ended, {message['cause'].replace('_', ' ')}: {message['text']}")
        elif kind == "validation":
            told = ", ".join(f"{name} {message[name]:.4g}" for name in sorted(GENERATED & message.keys()))
            self.note(f"answers of step {message['step']}: {told}")
        elif kind == "restart":
            self.note(f"the workers ended: {message['text']}")
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
