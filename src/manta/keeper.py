"""The actor that holds copies in a node's memory. It imports neither torch nor what needs it: a process of a moment."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

Key = tuple[int, int]  # attempt, step

KEPT = 2  # a whole copy, and one that is being made


@dataclass(frozen=True)
class _Part:
    world: int
    digest: str
    payload: np.ndarray


class Keeper:
    """Ray actor, one on each node: the last copies, by (attempt, step) and rank."""

    def __init__(self) -> None:
        self.parts: dict[Key, dict[int, _Part]] = {}

    def put(self, key: Key, rank: int, world: int, digest: str, payload: np.ndarray) -> float:
        """Keep a part; returns the CPU seconds that it took."""
        start = time.process_time()
        # A copy of its own: the argument lives in the object store as long as the worker does.
        self.parts.setdefault(key, {})[rank] = _Part(world, digest, payload.copy())
        for old in sorted(self.parts)[:-KEPT]:
            del self.parts[old]
        return time.process_time() - start

    def whole_parts(self) -> dict[Key, dict[int, int]]:
        """For each copy the ranks whose part is here and as it was sent, with the world size of that time."""
        return {
            key: {rank: part.world for rank, part in parts.items() if digest(part.payload) == part.digest}
            for key, parts in self.parts.items()
        }

    def about(self, key: Key, rank: int) -> dict[str, Any]:
        return about(self.parts[key][rank].payload)

    def get(self, key: Key, rank: int) -> np.ndarray:
        return self.parts[key][rank].payload


def digest(payload: np.ndarray) -> str:
    """XXH3 of 128 bits, which is faster than memory; nobody forges a copy."""
    return xxhash.xxh3_128_hexdigest(payload.data)


def about(payload: np.ndarray) -> dict[str, Any]:
    """What `parcel.pack` put into the header, which in a safetensors file is its length in 8 bytes, and JSON."""
    size = int(payload[:8].view(np.uint64)[0])
    return json.loads(json.loads(payload[8 : 8 + size].tobytes())["__metadata__"]["about"])
