"""How far a run is: one small record, folded from what workers say, which the terminal, `progress.json`, Prometheus and
notifications all tell from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from time import time as now
from typing import Any, Literal, Self, get_args

from manta import manifest
from manta.config import GENERATED
from manta.runs import Checkpoint

State = Literal["preparing", "starting", "training", "restarting", "finished", "stopped", "failed"]
STATES: tuple[State, ...] = get_args(State)
LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")  # of a log line
_WINDOW_S = 30.0  # of the speed; at least the last two steps, however long they take


@dataclass
class Status:
    """`step` is the last one done, which a restart can set back; `tokens` are those that this driver's workers
    computed, steps done again among them. Times are UNIX seconds."""

    run: str = ""
    state: State = "preparing"
    step: int = 0
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    answers: dict[str, float] = field(default_factory=dict)  # newest figures of generated answers
    tokens: int = 0
    tokens_per_second: float | None = None
    eta_s: float | None = None
    workers: int | None = None
    attempt: int = 0  # over all drivers of the run
    restarts: int = 0  # of this driver's workers
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    began: float = field(default_factory=now)
    time: float = field(default_factory=now)  # of the last change
    _recent: deque[tuple[int, float, int]] = field(default_factory=deque)  # step, when first heard of, tokens till then

    def begin(self, max_steps: int, latest: Checkpoint | None) -> None:
        """The workers are about to be started, from the checkpoint `latest` if there is one."""
        self.state, self.max_steps, self.time = "starting", max_steps, now()
        if latest:
            self.step = self.checkpoint_step = latest.step
            self.checkpoint_time = (latest.path / manifest.NAME).stat().st_mtime

    def take(self, message: dict[str, Any]) -> None:
        """One message of the mailbox."""
        kind, self.time = message["kind"], message["time"]
        if kind == "step":
            self._step(message["step"], message["tokens"])
        elif kind == "log":
            for name in LOGGED:
                setattr(self, name, message.get(name, getattr(self, name)))
        elif kind == "attempt":
            self.restarts += self.workers is not None
            self.state, self.step = "starting", message["step"]
            self._recent.clear()
            self.attempt, self.workers = message["attempt"], message["world_size"]
            self.tokens_per_second = self.eta_s = None
        elif kind == "checkpoint":
            self.checkpoint_step, self.checkpoint_time = message["step"], message["time"]
        elif kind in ("restart", "failure"):
            self.state, self.tokens_per_second, self.eta_s = "restarting", None, None
        elif kind == "validation":
            self.answers = {name: message[name] for name in sorted(GENERATED & message.keys())}

    def _step(self, step: int, tokens: int) -> None:
        """One rank's word that `step` is done. The speed is taken between the first words on two steps."""
        self.state, self.tokens = "training", self.tokens + tokens
        if step <= self.step and self._recent:
            return
        self.step = max(step, self.step)
        self._recent.append((step, self.time, self.tokens))
        while len(self._recent) > 2 and self._recent[0][1] < self.time - _WINDOW_S:
            self._recent.popleft()
        first, since, before = self._recent[0]
        if (seconds := self.time - since) > 0:
            self.tokens_per_second = (self.tokens - before) / seconds
            self.eta_s = (self.max_steps - step) * seconds / (step - first) if self.max_steps else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `progress.json` holds them."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @classmethod
    def load(cls, values: dict[str, Any]) -> Self:
        """The inverse of `as_dict`; what another version of Manta wrote besides is left out."""
        names = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})
