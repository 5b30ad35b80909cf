"""Which rows a step consumes, in which micro-batch, on which rank: the same whatever the number of workers.

A step owns M micro-batches of B rows. Its rows are the next M·B of an endless stream of permutations, one per epoch,
keyed by (seed, epoch), so that the position is a function of the step alone. They are dealt out by length, so that
micro-batches have about as many tokens: ranks wait for the slowest. Micro-batch j belongs to rank j mod W; where M is
not a multiple of W, the ranks without one get a fully masked row, which token-normalised loss weighs 0.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from manta.data.packing import Packs
from manta.data.tokenize import IGNORE

# padded: a sample a row; packed: documents told apart by position_ids; joined: all of a micro-batch in one such row,
# without padding, for an attention that knows documents.
Layout = Literal["padded", "packed", "joined"]

MASKED = -1  # the row that fills a micro-batch nobody owns


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The global order of samples: `rows` in the dataset, `batch` rows a micro-batch, `micro_batches` a step.

    `lengths`, tokens of each row, if they differ.
    """

    rows: int
    batch: int
    micro_batches: int
    seed: int
    lengths: np.ndarray | None = None

    def micro_batch(self, step: int, index: int) -> list[int]:
        """Rows of micro-batch `index` (0 … M-1) of step `step` (0-based), B of them."""
        return _dealt(self, step)[index]

    def step(self, step: int) -> list[int]:
        """Rows of step `step` as the stream has them."""
        size = self.micro_batches * self.batch
        return [self._row(position) for position in range(step * size, (step + 1) * size)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        return int(_permutation(self.seed, epoch, self.rows)[offset])

    def epochs(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.micro_batches * self.batch / self.rows


@lru_cache(maxsize=4)
def _dealt(order: SampleOrder, step: int) -> list[list[int]]:
    """The micro-batches of a step: the longest row first, each to where the fewest tokens are and there is room."""
    rows, lengths = order.step(step), order.lengths
    if lengths is None or order.micro_batches == 1:
        return [rows[first : first + order.batch] for first in range(0, len(rows), order.batch)]
    dealt: list[list[int]] = [[] for _ in range(order.micro_batches)]
    open_ones = [(0, index) for index in range(order.micro_batches)]  # a heap of (tokens, micro-batch)
    for row in sorted(rows, key=lambda row: -lengths[row]):
        tokens, index = heapq.heappop(open_ones)
        dealt[index].append(row)
        if len(dealt[index]) < order.batch:
            heapq.heappush(open_ones, (tokens + int(lengths[row]), index))
    return dealt


def most_tokens(lengths: np.ndarray, batch: int, layout: Layout) -> int:
    """Tokens of the largest micro-batch of `batch` sequences there can be, padding included."""
    longest = np.sort(lengths)[-batch:]
    return int(longest.sum() if layout == "joined" else batch * longest[-1])


class TrainBatches(Sampler[list[int]]):
    """This rank's micro-batches from step `start` to step `steps`, ceil(M / W) of them a step."""

    def __init__(self, order: SampleOrder, start: int, steps: int, rank: int, world_size: int):
        self.order, self.start, self.steps, self.rank, self.world_size = order, start, steps, rank, world_size
        self.per_step = -(-order.micro_batches // world_size)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            for slot in range(self.per_step):
                index = slot * self.world_size + self.rank
                yield self.order.micro_batch(step, index) if index < self.order.micro_batches else [MASKED]

    def __len__(self) -> int:
        # Counted from step 0 also after a resume: the Trainer derives steps per epoch from it.
        return self.steps * self.per_step


class EvalBatches(Sampler[list[int]]):
    """Rows 0 … rows-1 in order, batch b on rank b mod W; every rank gets as many batches (FSDP gathers in each)."""

    def __init__(self, rows: int, batch: int, rank: int, world_size: int):
        self.rows, self.batch, self.rank, self.world_size = rows, batch, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for slot in range(len(self)):
            first = (slot * self.world_size + self.rank) * self.batch
            yield list(range(first, min(first + self.batch, self.rows))) or [MASKED]

    def __len__(self) -> int:
        return -(-self.rows // (self.batch * self.world_size))


class Rows(Dataset):
    """Sequences by index: a tokenized sample, or with `packs` several that follow each other.

    Each document's positions begin at 0, and its first token is never a target: nothing before it says what it will
    be. MASKED gives a sequence of one token that trains nothing.
    """

    def __init__(self, samples: Any, packs: Packs | None = None):
        self.samples, self.packs = samples, packs

    def __len__(self) -> int:
        return len(self.samples if self.packs is None else self.packs)

    def members(self, index: int) -> list[int]:
        """The samples of a sequence."""
        return [index] if self.packs is None else self.packs[index]

    def sources(self, index: int) -> list[int]:
        """Source rows of a sequence."""
        return [int(self.samples[member]["row"]) for member in self.members(index)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == MASKED:
            return {"row": MASKED, "input_ids": np.zeros(1, np.int64), "labels": np.full(1, IGNORE), "starts": [0]}
        samples = [self.samples[member] for member in self.members(index)]
        lengths = [len(sample["input_ids"]) for sample in samples]
        starts = np.cumsum([0, *lengths[:-1]])
        labels = np.concatenate([sample["labels"] for sample in samples])
        labels[starts] = IGNORE
        return {
            "row": index,
            "input_ids": np.concatenate([sample["input_ids"] for sample in samples]),
            "labels": labels,
            "starts": starts.tolist(),
        }


def collate(
    rows: Sequence[dict[str, Any]], pad_token_id: int, layout: Layout = "padded", picked: bool = False
) -> dict[str, Any]:
    """Pad to the longest row: input_ids and labels of shape (batch, length), rows of shape (batch,).

    Padding is told by attention_mask; in the other layouts position_ids tell documents apart instead, and padding is
    one more document. Joined, their boundaries are there once for all layers, under the names that transformers knows
    (FlashAttentionKwargs): cu_seq_lens, int32 [documents + 1], and max_length. tokens, shape (), counts what is not
    padding. `picked` adds what lets the model compute logits only where they are trained: logits_to_keep, bool (batch,
    length), and shift_labels, the next tokens there; of the first position, if of none.
    """
    sequences = [row["row"] for row in rows]
    if layout == "joined":
        rows = [_joined(rows)]
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        input_ids[i, :size] = torch.as_tensor(row["input_ids"])
        labels[i, :size] = torch.as_tensor(row["labels"])
        attention_mask[i, :size] = 1
        for start in [*row["starts"], size]:
            position_ids[i, start:] = torch.arange(length - start)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "rows": torch.tensor(sequences),
        "tokens": attention_mask.sum(),
        **({"attention_mask": attention_mask} if layout == "padded" else {"position_ids": position_ids}),
        **(_boundaries(rows[0]) if layout == "joined" else {}),
        **(_picked(labels) if picked else {}),
    }


def _picked(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    keep = following != IGNORE
    if not keep.any():
        keep[0, 0] = True
    return {"logits_to_keep": keep, "shift_labels": following[keep]}


def _boundaries(row: dict[str, Any]) -> dict[str, Any]:
    edges = torch.tensor([*row["starts"], len(row["input_ids"])], dtype=torch.int32)
    longest = int(edges.diff().max())
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def _joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of all: exact, since no document's first token is a target."""
    firsts = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
    return {
        "input_ids": np.concatenate([row["input_ids"] for row in rows]),
        "labels": np.concatenate([row["labels"] for row in rows]),
        "starts": [first + start for first, row in zip(firsts[:-1], rows, strict=True) for start in row["starts"]],
    }
