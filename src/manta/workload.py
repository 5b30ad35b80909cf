"""How much a run computes: sequences, steps, tokens, operations of a token; from the data as far as it is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from manta import model, storage
from manta.config import Config
from manta.data import prepare, shards
from manta.data.prepare import Prepared
from manta.runs import Run

Source = Literal["prepared", "sampled", "assumed"]
SAMPLED = 256  # rows of each source


@dataclass(frozen=True)
class Workload:
    """`lengths` are tokens per sequence: of all, of a sample, or max_seq_length where nothing is known."""

    source: Source
    sequences: int | None
    lengths: np.ndarray
    steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def seen(self) -> float:
        """Mean length of the sequence that a token is in."""
        return float(np.square(self.lengths, dtype=np.float64).sum() / self.lengths.sum())


def of(config: Config) -> Workload:
    """The work of `config`, whose `nominal_workers` are set. Raises UserError on data that cannot be used.

    Prepared data is counted. Otherwise the first rows of local files are tokenized; data on the hub or in a store is
    not fetched, and every sequence is taken for as long as it may be.
    """
    prepared, _ = prepare.locate(config)
    if prepare.is_ready(prepared):
        return _counted(config, prepared.fetched())
    if all(Path(part.dataset_name).expanduser().exists() for part in config.hf_dataset_config.parts()):
        return _sampled(config, prepared)
    return _workload(config, "assumed", None, np.array([config.max_seq_length]), float(config.max_seq_length))


def steps(config: Config, sequences: int | None) -> int:
    """Optimizer steps, as the driver counts them; max_steps where the sequences are unknown."""
    from manta.train import max_steps

    return config.max_steps if sequences is None else max_steps(config, sequences)


def _counted(config: Config, prepared: Prepared) -> Workload:
    counts = prepared.counts["training"]
    lengths = prepared.lengths("training")[0]
    mean = config.max_seq_length * counts["fill"] if config.packing else float(lengths.mean())
    return _workload(config, "prepared", counts["sequences"], lengths, mean)


def _sampled(config: Config, prepared: Prepared) -> Workload:
    job = prepare.open_job(config, prepared)
    try:
        lengths = np.array(shards.sampled_lengths(job, SAMPLED) or [config.max_seq_length])
        rows = int((job.splits == 0).sum())
    finally:
        prepare.forget_sources(prepared)
    if not config.packing:
        return _workload(config, "sampled", rows, lengths, float(lengths.mean()))
    sequences = max(1, round(rows * float(lengths.mean()) / config.max_seq_length))
    return _workload(config, "sampled", sequences, lengths, float(config.max_seq_length))


def _workload(config: Config, source: Source, sequences: int | None, lengths: np.ndarray, mean: float) -> Workload:
    per_step = round(config.per_device_train_batch_size * config.micro_batches(1) * mean)
    return Workload(source, sequences, lengths, steps(config, sequences), per_step)


def shortened(work: Workload, length: int) -> Workload:
    """The same sequences, none longer than `length`."""
    return replace(work, lengths=np.minimum(work.lengths, length))


def flops_per_token(config: Config, bare: Any, seen: float, recomputed: str) -> float:
    """Forward and backward of one token: 6 N, or 4 N for LoRA, whose frozen weights get no gradients, and attention.

    N: parameters in matrices, the output's included, the input's table left out; attention, which is causal, 6 · layers
    · hidden · length of the token's sequence (as in Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1).
    With full recomputation a forward pass more.
    """
    table = bare.get_input_embeddings().weight
    matrices = sum(each.numel() for each in bare.parameters() if each.ndim == 2)
    if bare.get_output_embeddings().weight is not table:
        matrices -= table.numel()
    text = bare.config.get_text_config()
    attention = len(model.layer_names(bare)) * text.hidden_size * seen
    backward = 4 if config.full_ft else 2
    forward = 2 * (2 if recomputed == "full" else 1)
    return (forward + backward) * matrices + (forward + 4) * attention


def earlier_throughput(config: Config, workers: int) -> tuple[float, str] | None:
    """Tokens/s of the newest run of this model in results_dir, and where that is from; scaled to `workers`.

    Of finished runs only, with the same kind of training on the same kind of device.
    """
    found: list[tuple[float, float, str]] = []
    for file in storage.place(config.results_dir).glob("*/result.json"):
        run = Run(file.parent)
        try:
            before, result = run.config(), run.result() or {}
            same = all(getattr(before, name) == getattr(config, name) for name in ("hf_model_id", "full_ft", "device"))
            rate, world = result.get("tokens_per_second"), (result.get("world_sizes") or [0])[-1]
            if same and rate and world:
                told = f"measured in {run.name} on {world} worker{'s' if world > 1 else ''}"
                found.append((file.stat().st_mtime, rate * workers / world, told + _scaled(world, workers)))
        except (ValueError, OSError):  # of another version, or half gone
            continue
    return max(found)[1:] if found else None


def _scaled(before: int, now: int) -> str:
    return "" if before == now else f", scaled to {now}"
