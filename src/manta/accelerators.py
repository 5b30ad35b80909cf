"""What a GPU type has: memory, and dense bf16 FLOP/s of its tensor cores, as the vendor publishes them.

From NVIDIA's data sheets, the figures without sparsity: H100, H200 and B200 (SXM unless named otherwise), A100, L40S,
L4, A10, and the Ada white paper for the RTX 4090 (with FP32 accumulation); A10G from AWS's page of the G5 instances.
https://www.nvidia.com/en-us/data-center/ and https://aws.amazon.com/ec2/instance-types/g5/
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from manta.errors import ConfigError


class Accelerator(NamedTuple):
    """Memory in GiB as it is sold, dense bf16 FLOP/s."""

    memory: int
    flops: float


ACCELERATORS = {
    "B200": Accelerator(180, 2250e12),
    "H200": Accelerator(141, 989e12),
    "H100": Accelerator(80, 989e12),
    "H100-PCIe": Accelerator(80, 756e12),
    "A100-80G": Accelerator(80, 312e12),
    "A100-40G": Accelerator(40, 312e12),
    "L40S": Accelerator(48, 362e12),
    "L4": Accelerator(24, 121e12),
    "A10": Accelerator(24, 125e12),
    "A10G": Accelerator(24, 70e12),
    "RTX-4090": Accelerator(24, 165e12),
}
# What a process can have of it: the driver, ECC and CUDA's context take the rest.
USABLE = 0.92


def find(names: str) -> dict[str, Accelerator]:
    """Those named, comma-separated. Raises ConfigError, with the nearest name."""
    known = {name.lower(): name for name in ACCELERATORS}
    chosen = {}
    for name in filter(None, (each.strip() for each in names.split(","))):
        if name.lower() not in known:
            nearest = difflib.get_close_matches(name.lower(), known, n=1)
            meant = f" Did you mean {known[nearest[0]]}?" if nearest else ""
            raise ConfigError(f"--accelerators: {name} is not known.{meant} Known: {', '.join(ACCELERATORS)}.")
        chosen[known[name.lower()]] = ACCELERATORS[known[name.lower()]]
    if not chosen:
        raise ConfigError(f"--accelerators names none. Known: {', '.join(ACCELERATORS)}.")
    return chosen


def of_device(name: str, memory: int) -> Accelerator | None:
    """The one that CUDA or Ray calls `name`, such as `NVIDIA A100-SXM4-80GB` or `H100`, with `memory` bytes."""
    plain = name.upper().replace(" ", "-")
    words, gib = set(plain.split("-")), memory / 2**30

    def parts(known: str) -> list[str]:
        return [part for part in known.upper().split("-") if part not in ("80G", "40G")]

    fits = [known for known in ACCELERATORS if words.issuperset(parts(known))]
    if not fits:
        return None
    best = min(fits, key=lambda each: (each.upper() != plain, -len(parts(each)), abs(ACCELERATORS[each].memory - gib)))
    return ACCELERATORS[best]
