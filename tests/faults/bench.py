"""Where fault rows run: a tiny model and data, undisturbed runs to compare with, and the rows as they come in."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from faults.job import Job
from manta import ledger
from manta.config import Config
from manta.runs import Run
from running import logged, order_of, small_config
from tiny import tiny_model

STEPS, SAVE = 80, 10
LOSS, WEIGHTS = 1e-5, 1e-6  # most that a disturbed run may differ, the latter at equal size only


@dataclass
class Row:
    """What one injected fault did. A figure that does not apply is None."""

    fault: str
    injected: str
    wasted_steps: int | None = None
    samples_lost: int | None = None
    samples_repeated: int | None = None
    max_loss_gap: float | None = None
    max_weight_gap: float | None = None
    seconds_to_new_step: float | None = None
    user_actions: int = 0  # besides the same command again
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.problems

    def must(self, condition: Any, otherwise: str) -> None:
        """A condition of the row: what is wrong where it is not met."""
        if not condition:
            self.problems.append(otherwise)


class Bench:
    """`rows` collects what scenarios find; everything is written below `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: list[Row] = []
        self.leaks: list[str] = []  # files that hold a secret
        self._references: dict[str, Run] = {}

    def config(self, kind: str, **settings: Any) -> Config:
        """A run of some hundred milliseconds a step: dropout, clipping at every step, two workers."""
        tiny_model_once(self.folder / "base")
        defaults = {
            "full_ft": kind == "full",
            "max_steps": STEPS,
            "save_steps": SAVE,
            "eval_steps": 0,
            "gradient_accumulation_steps": 6,
            "nominal_workers": 2,
            "lora_dropout": 0.1,
            "max_grad_norm": 0.05,
            "learning_rate": 2e-3,
            "max_failures": 20,
            "step_timeout_s": 30,
        }
        known = {key: value for key, value in (defaults | settings).items() if key in Config.model_fields}
        return small_config(self.folder, **known, data=settings.get("data", {}))

    def job(self, name: str, kind: str = "lora", cluster: str | None = None, **settings: Any) -> Any:
        # A copy costs more than the 3 % of so short a step that `auto` allows: it would leave some out.
        settings = {"step_copies": "every", **settings}
        return self.running(self.config(kind, run_name=name, ray_address=cluster, **settings), self.folder)

    @contextlib.contextmanager
    def running(self, config: Config, folder: Path) -> Iterator[Job]:
        """A job whose files are searched for the secrets of its environment when it is over."""
        with Job(config, folder) as job:
            try:
                yield job
            finally:
                self.leaks += job.scan()

    def reference(self, kind: str = "lora") -> Run:
        """The undisturbed run of this kind."""
        if kind not in self._references:
            with self.job(f"undisturbed-{kind}", kind) as job:
                job.start()
                if job.wait(240) != 0:
                    raise RuntimeError(f"the undisturbed run failed:\n{job.said()}")

            self._references[kind] = job.run
        return self._references[kind]

    @contextlib.contextmanager
    def row(self, fault: str, injected: str) -> Iterator[Row]:
        """A row whose block injects a fault and looks at what comes of it; an error in it breaks the row."""
        row = Row(fault, injected)
        start = time.monotonic()
        try:
            yield row
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            row.problems.append(f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
        self.rows.append(row)
        state = "holds" if row.holds else f"FAILS: {'; '.join(row.problems)}"
        print(f"[{time.monotonic() - start:5.1f} s] {row.fault} · {row.injected}: {state}", flush=True)

    def compare(
        self,
        job: Job,
        rows: list[Row],
        kind: str = "lora",
        weights: float | None = WEIGHTS,
        reference: Run | None = None,
    ) -> None:
        """Hold the end of a disturbed run against the undisturbed one, for all faults that it had."""
        reference, latest = reference or self.reference(kind), job.run.latest()
        if latest is None:
            for row in rows:
                row.problems.append("the run left no checkpoint")
            return
        wanted = consumed(job.config, latest.step)
        found = Counter(micro_batches(ledger.read(job.run.ledger, latest.step)))
        lost, repeated = (wanted - found).total(), (found - wanted).total()
        ours, theirs = logged(job.run, "loss"), logged(reference, "loss")
        gap = max((abs(ours[step] - theirs[step]) for step in ours), default=None)
        difference = weight_gap(job.run, reference, latest.step) if latest.step == job.config.max_steps else None
        for row in rows:
            row.samples_lost, row.samples_repeated = lost, repeated
            row.max_loss_gap, row.max_weight_gap = gap, difference
            row.must(lost == repeated == 0, f"{lost} samples lost, {repeated} repeated")
            row.must(gap is not None and gap <= LOSS, f"loss differs by {gap}")
            row.must(weights is None or difference is None or difference <= weights, f"weights differ by {difference}")


def tiny_model_once(folder: Path) -> None:
    if not folder.exists():
        tiny_model(folder, attention_dropout=0.1)


def micro_batches(entries: list[ledger.Entry]) -> Iterator[tuple[int, int, int]]:
    """(step, micro-batch, row) of each sample."""
    for step, index, rows in entries:
        yield from ((step, index, row) for row in rows)


def consumed(config: Config, steps: int) -> Counter[tuple[int, int, int]]:
    """Every sample of the first steps, as the order predicts it."""
    order = order_of(config)
    entries = [
        (step, index, order.micro_batch(step, index)) for step in range(steps) for index in range(order.micro_batches)
    ]
    return Counter(micro_batches(entries))


def weight_gap(ours: Run, theirs: Run, step: int) -> float:
    """Largest difference between the weights that two runs trained up to `step`."""
    one, other = (_trained(run, step) for run in (ours, theirs))
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _trained(run: Run, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder = max(found.path for found in run.checkpoints() if found.step == step) / "model"
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
