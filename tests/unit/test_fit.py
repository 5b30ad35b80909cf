"""What `auto` stands for: a frozen base is whole on each worker, nothing is computed again, as far as there is room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from manta import fit, memory
from manta.config import Config
from manta.fit import Room
from manta.memory import Memory
from manta.model import Placement
from manta.simulation import Shape
from tiny import tiny_model

SHAPE = Shape(1, 96)
PLENTY = Room(1 << 40, 1 << 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("fit"), num_hidden_layers=4)


def config_of(folder: str, **settings: Any) -> Config:
    return Config(**{"hf_model_id": folder, "device": "cpu", "gradient_accumulation_steps": 1, **settings})


def on(workers: int) -> Placement:
    return Placement(torch.device("cpu"), workers)


def chosen(config: Config, workers: int = 2, there: Room = PLENTY, quick: bool = True) -> tuple[str, str]:
    settled = fit.settle(config, on(workers), SHAPE, there, quick)
    return settled.config.sharding_strategy, settled.recomputed


@pytest.mark.parametrize("quick", [True, False], ids=["bound", "estimate"])
def test_a_frozen_base_is_whole_where_it_fits_and_what_is_trained_is_sharded(folder, quick):
    assert chosen(config_of(folder), quick=quick) == ("NO_SHARD", "none")
    assert chosen(config_of(folder, full_ft=True), quick=quick) == ("FULL_SHARD", "none")
    assert chosen(config_of(folder, fsdp_cpu_offload=True), quick=quick) == ("FULL_SHARD", "none")
    assert chosen(config_of(folder, full_ft=True), workers=1, quick=quick) == ("NO_SHARD", "none")


def test_what_was_asked_for_is_kept(folder):
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"):
        for what in ("none", "selective", "full"):
            asked = config_of(folder, sharding_strategy=strategy, gradient_checkpointing=what)
            assert fit.settle(asked, on(2), SHAPE, PLENTY) == fit.Settled(asked, "as asked")
    assert chosen(config_of(folder, gradient_checkpointing="selective")) == ("NO_SHARD", "selective")
    assert chosen(config_of(folder, gradient_checkpointing="full", full_ft=True)) == ("FULL_SHARD", "full")


@pytest.mark.parametrize("quick", [True, False], ids=["bound", "estimate"])
def test_a_base_that_fits_only_in_part_is_sharded(folder, quick):
    """What is free comes down: sharded as soon as whole does not fit, computed again as soon as that does not."""
    config = config_of(folder, lora_rank=4)
    whole = memory.estimate(config.model_copy(update={"sharding_strategy": "NO_SHARD"}), on(2), SHAPE, "none")
    assert whole is not None
    just = whole.weights + whole.adapters + int(whole.beside_weights / 0.7) + 1024
    spread = int(0.1 * just)  # what a heap holds differs a little each time
    assert chosen(config, there=Room(just + spread, 1 << 40), quick=quick) == ("NO_SHARD", "none")
    assert chosen(config, there=Room(just - spread, 1 << 40), quick=quick)[0] == "FULL_SHARD"
    assert chosen(config, there=Room(0, 0), quick=quick) == ("FULL_SHARD", "full")
    # Each worker reads a whole base into its host's memory before its device has it.
    assert chosen(config, there=Room(1 << 40, whole.weights), quick=quick) == ("FULL_SHARD", "none")


@pytest.mark.parametrize("free", [1 << 40, 0])
def test_as_little_as_memory_allows_is_computed_again(folder, free):
    wanted = "none" if free else "full"
    assert chosen(config_of(folder, full_ft=True), 1, Room(free, free)) == ("NO_SHARD", wanted)


def test_the_bound_is_asked_first_and_the_estimate_only_if_that_does_not_fit(folder, monkeypatch):
    def never(*arguments: Any) -> None:
        raise AssertionError("estimated")

    monkeypatch.setattr(fit, "estimate", never)
    assert chosen(config_of(folder)) == ("NO_SHARD", "none")
    with pytest.raises(AssertionError, match="estimated"):
        chosen(config_of(folder), there=Room(0, 0))


@pytest.mark.parametrize(
    ("free", "wanted", "estimates"), [(200, "none", 1), (100, "selective", 3), (40, "full", 3), (1, "full", 2)]
)
def test_no_more_is_estimated_than_is_needed_to_choose(free, wanted, estimates):
    sizes, asked = {"none": 100, "selective": 60, "full": 20}, []

    def needs(what: Any) -> Memory:
        asked.append(what)
        return Memory(**{**dict.fromkeys(Memory.__dataclass_fields__, 0), "activations": sizes[what]})

    assert fit.choose(needs, free)[0] == wanted and len(asked) == estimates


def test_free_memory_is_the_containers_where_that_is_less(tmp_path: Path, monkeypatch):
    here = Placement(torch.device("cpu"), world_size=4, nodes=2)
    whole = fit.free_bytes(on(1))
    assert whole > 1 << 20
    (tmp_path / "memory.max").write_text("4096\n")
    (tmp_path / "memory.current").write_text("1024\n")
    monkeypatch.setattr(fit, "_CGROUP", tmp_path)
    assert fit.free_bytes(here) == 3072 // 2
    assert fit.room(here) == Room(3072 // 2, 3072 // 2)
    (tmp_path / "memory.max").write_text("max\n")
    assert fit.free_bytes(here) > 4096
