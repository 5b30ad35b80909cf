"""Which samples share a sequence, and how often an epoch sees a sample. Samples themselves stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Samples are packed in groups of about this many tokens: memory is bounded, and a group's last, emptier packs are few.
GROUP_TOKENS = 4_000_000


@dataclass(frozen=True)
class Packs:
    """Sequences as lists of samples: pack i holds `samples[offsets[i] : offsets[i + 1]]`."""

    offsets: np.ndarray  # shape (packs + 1,), int64
    samples: np.ndarray  # shape (samples,), int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        return self.samples[self.offsets[index] : self.offsets[index + 1]].tolist()

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Of each sequence, from those of the samples, `lengths`."""
        return np.add.reduceat(lengths[self.samples], self.offsets[:-1])

    def save(self, path: Path) -> None:
        np.savez(path, offsets=self.offsets, samples=self.samples)

    @classmethod
    def load(cls, path: Path) -> Packs:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["offsets"], arrays["samples"])

    @classmethod
    def singly(cls, samples: np.ndarray) -> Packs:
        """Each sample a sequence of its own."""
        return cls(np.arange(len(samples) + 1), samples)


def repeated(weights: np.ndarray, seed: int) -> np.ndarray:
    """Samples of an epoch in source order, each as often as its weight says; of a fraction, a seeded draw.

    `weights` has shape (samples,). A weight of 1.5 sees half of its samples twice, the exact half rounded once.
    """
    times = np.floor(weights).astype(np.int64)
    for weight in np.unique(weights):
        if fraction := float(weight) % 1:
            members = np.flatnonzero(weights == weight)
            drawn = np.random.default_rng([seed, len(members)]).permutation(members)
            times[drawn[: round(fraction * len(members))]] += 1
    return np.repeat(np.arange(len(weights)), times)


def pack(lengths: np.ndarray, samples: np.ndarray, capacity: int) -> Packs:
    """Best-fit-decreasing packs of at most `capacity` tokens (Ding et al., 2024, https://arxiv.org/abs/2404.10830).

    `lengths` are tokens per sample, shape (all samples,); `samples` those to pack, in order, with repeats. The bins are
    found by TRL's `pack_dataset`.
    """
    packs = [_pack_group(group, lengths[group], capacity) for group in _groups(samples, lengths[samples])]
    sizes = np.concatenate([sizes for sizes, _ in packs])
    return Packs(np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([members for _, members in packs]))


def fill(packs: Packs, lengths: np.ndarray, capacity: int) -> float:
    """Share of the packs' token slots that hold a token."""
    return float(lengths[packs.samples].sum() / (len(packs) * capacity))


def _groups(samples: np.ndarray, lengths: np.ndarray) -> Sequence[np.ndarray]:
    group = (np.cumsum(lengths) - 1) // GROUP_TOKENS
    return np.split(samples, np.flatnonzero(np.diff(group)) + 1)


def _pack_group(samples: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(samples of each pack, their numbers in pack order)."""
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    # The library packs columns of tokens: each sample's number stands for all of its tokens.
    tokens = pa.array(np.repeat(np.arange(len(samples), dtype=np.int32), lengths))
    column = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), tokens)
    table = datasets.Dataset(pa.table({"sample": column}))
    datasets.disable_progress_bars()
    packed = pack_dataset(table, capacity, "bfd", {"batch_size": len(samples), "keep_in_memory": True})
    columns = packed.data.table.combine_chunks()
    sizes = columns["seq_lengths"].combine_chunks()
    documents = sizes.flatten().to_numpy()  # tokens of each sample, in pack order
    members = columns["sample"].combine_chunks().flatten().to_numpy()[np.cumsum(documents) - documents]
    return sizes.value_lengths().to_numpy(), samples[members]
