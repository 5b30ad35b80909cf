"""Whether a run goes on after its workers ended: the causes told apart, and a budget for each.

Ray restarts workers after whatever happens; the decision is made here, in the mailbox. What is known at once of a
failure (an error of its own in some worker) is judged at once, the rest when the next attempt begins: only then is it
known whether a node is gone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

Cause = Literal["worker", "error", "node", "preemption", "hang", "out_of_memory", "resize"]

# Of several reports on one failure the first of these is what happened; the others follow from it.
_PRECEDENCE: tuple[Cause, ...] = ("out_of_memory", "error", "preemption", "node", "hang", "worker", "resize")
_COUNTED = ("worker", "error", "hang")
_STARTS = 3


@dataclass(frozen=True)
class Policy:
    """`max_failures` and `max_node_losses` as in the config; `rows` of a micro-batch, and whether fewer will do."""

    max_failures: int
    max_node_losses: int
    rows: int
    halve: bool


@dataclass
class Attempts:
    """Follows the attempts of one driver. `number` counts those of earlier drivers too; each micro-batch of the config
    is divided into `split` smaller ones."""

    policy: Policy
    number: int = 0
    split: int = 1
    events: list[dict[str, Any]] = field(default_factory=list)  # for events.jsonl; whoever holds this takes them
    _step: int = 0  # finished last
    _saved: int = 0
    _in_loop: bool = False
    _running: bool = False
    _nodes: frozenset[str] = frozenset()
    _leaving: frozenset[str] = frozenset()  # nodes that will be taken away
    _reports: list[tuple[Cause, str]] = field(default_factory=list)
    _groups: set[int] = field(default_factory=set)  # of workers that failed since an attempt began
    _failures: int = 0
    _node_losses: int = 0
    _last: tuple[int, bool, str] | None = None  # step, whether the loop was reached, and text of the last failure
    _stop: str | None = None

    def begin(self, step: int, nodes: Collection[str], alive: Collection[str]) -> str | None:
        """A new attempt starts from `step` on `nodes`; `alive` are the cluster's. Returns why not to go on, or None."""
        if self._running:
            self._judge(frozenset(alive))
        self.number += 1
        self._step, self._nodes, self._in_loop, self._running = step, frozenset(nodes), False, True
        self._saved = max(self._saved, step)
        self._leaving = frozenset()
        self._groups.clear()
        return self._stop

    def entered_loop(self) -> None:
        """The workers are through with starting: what fails from here on is a step."""
        self._in_loop = True

    def finished(self, step: int) -> None:
        self._step = max(self._step, step)

    def saved(self, step: int) -> None:
        """A new checkpoint is progress: failures before it no longer count."""
        if step > self._saved:
            self._saved, self._failures = step, 0

    def preempted(self, nodes: Collection[str]) -> None:
        """The cluster said that `nodes` will be taken away."""
        self._leaving |= set(nodes)

    def report(self, cause: Cause, text: str) -> None:
        """Said by a worker before it ends."""
        if self._running:
            self._reports.append((cause, text))

    def failed(self, group: int, cause: Cause, text: str) -> str | None:
        """Said by Ray's controller of its `group`-th group of workers; returns why the run must end, if it must."""
        self._groups.add(group)
        if self._running:
            self._reports.append((cause, text))
            if self._worst()[0] in ("error", "out_of_memory"):
                self._judge(None)
        elif len(self._groups) >= _STARTS:
            self._stop = f"The workers failed {_STARTS} times before training began; the last time: {text}"
        return self._stop

    def _worst(self) -> tuple[Cause, str]:
        return min(self._reports, key=lambda report: _PRECEDENCE.index(report[0]))

    def _judge(self, alive: frozenset[str] | None) -> None:
        """Decide on the attempt that has ended; `alive` is None where the nodes do not matter."""
        cause, text = self._worst() if self._reports else ("resize", "Ray started other workers")
        gone = self._nodes - alive if alive is not None else frozenset()
        if cause in ("worker", "hang", "node", "resize") and self._leaving:
            cause, text = "preemption", f"a node is taken away ({_names(self._leaving)})"
        elif cause in ("worker", "hang", "node", "resize") and gone:
            cause, text = "node", f"a node was lost ({_names(gone)})"
        self.events.append(
            {"kind": "failure", "attempt": self.number, "step": self._step, "cause": cause, "text": text}
        )
        if cause == "out_of_memory":
            self._stop = self._divide(text)
        elif cause in ("node", "preemption"):
            self._node_losses += 1
            if self._node_losses > self.policy.max_node_losses:
                self._stop = (
                    f"{_times(self._node_losses, 'lost or preempted node')}, more than --max_node_losses "
                    f"{self.policy.max_node_losses} allows; the last: {text}."
                )
        elif cause in _COUNTED:
            self._stop = self._count(cause, text)
        self._reports.clear()
        self._running = False

    def _count(self, cause: Cause, text: str) -> str | None:
        """Budget, and failures that a restart would only repeat."""
        self._failures += 1
        now = (self._step, self._in_loop, text)
        before, self._last = self._last, now
        same_error = cause == "error" and before == now
        if same_error or (before and self._in_loop and before[:2] == now[:2]):
            where = f"Step {self._step + 1}" if self._in_loop else "The start of the workers"
            return f"{where} failed twice, so a restart would only repeat it: {text}."
        if self._failures > self.policy.max_failures:
            return (
                f"{_times(self._failures, 'failure')} since step {self._saved}, more than --max_failures "
                f"{self.policy.max_failures} allows; the last, in step {self._step + 1}: {text}."
            )
        return None

    def _divide(self, text: str) -> str | None:
        """Fewer rows per micro-batch, and as many more of them."""
        rows = self.policy.rows // self.split
        if not self.policy.halve or rows == 1:
            advice = (
                "Lower --max_seq_length, or use a larger device or more workers."
                if rows == 1
                else "Lower --per_device_train_batch_size, or allow it to be halved with --out_of_memory halve."
            )
            return (
                f"Step {self._step + 1} ran out of memory with {_times(rows, 'row')} per micro-batch ({text}). {advice}"
            )
        smaller = max(part for part in range(1, rows) if rows % part == 0)
        self.split = self.policy.rows // smaller
        self.events.append(
            {
                "kind": "note",
                "text": f"out of memory: micro-batches have {_times(smaller, 'row')} from here on, not {rows}, and are "
                f"{rows // smaller} times as many; a step takes the same samples",
            }
        )
        return None


def _names(nodes: Collection[str]) -> str:
    return ", ".join(sorted(node[:12] for node in nodes))


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
