"""Copies in memory: what a keeper keeps and vouches for, and which copy a restart takes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from manta.copies import Copier, _newest
from manta.keeper import Keeper, about, digest
from manta.parcel import pack, put, trained, unpack


def payload(value: float, **described) -> np.ndarray:
    return pack({"weight": torch.full((4, 2), value)}, {"boxes": {}, **described})


def keep(keeper, step, rank=0, world=1, attempt=1, damaged=False):
    sent = payload(step)
    its = digest(sent)
    if damaged:
        sent = sent.copy()
        sent[-1] ^= 1
    keeper.put((attempt, step), rank, world, its, sent)


def test_a_keeper_keeps_the_last_two_and_vouches_for_what_is_as_it_was_sent():
    keeper = Keeper()
    for step in (3, 4, 5):
        keep(keeper, step)
    keep(keeper, 5, rank=1, damaged=True)
    assert keeper.whole_parts() == {(1, 4): {0: 1}, (1, 5): {0: 1}}


def test_a_restart_replaces_copies_of_the_attempt_before():
    keeper = Keeper()
    keep(keeper, 7)
    keep(keeper, 8)
    keep(keeper, 8, attempt=2)
    assert set(keeper.whole_parts()) == {(1, 8), (2, 8)}


def test_header_is_read_without_the_tensors():
    packed = payload(1.0, committed=6, entries=[[6, 0, [1, 2]]])
    assert about(packed)["committed"] == 6 and about(packed)["entries"] == [[6, 0, [1, 2]]]


def test_optimizer_state_and_weights_come_back_bit_for_bit():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors, boxes = trained(model, optimizer)
    packed = pack(tensors, {"boxes": boxes})
    again = torch.nn.Linear(5, 3)
    fresh = torch.optim.AdamW(again.parameters(), lr=0.1)
    unpack(packed, dict(again.named_parameters()), fresh)
    data = torch.randn(2, 5)
    for network, its in ((model, optimizer), (again, fresh)):
        network(data).square().sum().backward()
        its.step()
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert fresh.state[ours].keys() == optimizer.state[theirs].keys()


@pytest.mark.parametrize(("offset", "rows"), [([0, 0], 3), ([3, 0], 2), (None, 5)])
def test_a_part_covers_its_box_of_the_whole(offset, rows):
    target = torch.zeros(5, 2)
    put(torch.ones(rows, 2), offset, target)
    first = offset[0] if offset else 0
    assert target[first : first + rows].eq(1).all() and target.sum() == rows * 2


def test_copies_are_as_rare_as_their_cost_asks():
    copier = Copier.__new__(Copier)
    copier.mode, copier._costs = "auto", [0.010, 0.012, 0.011]
    assert copier._interval(None) == 1
    assert copier._interval(1.0) == 1  # 1.1 % of a step
    assert copier._interval(0.1) == 4  # 11 %: every fourth step is 2.75 %
    copier.mode = "every"
    assert copier._interval(0.1) == 1


@pytest.mark.slow
def test_restart_takes_the_newest_copy_that_all_ranks_have_whole(ray_cluster):
    import ray

    from manta.progress import NAMESPACE

    names = ["keeper-a", "keeper-b", "keeper-gone"]
    actors = [ray.remote(num_cpus=0)(Keeper).options(name=name, namespace=NAMESPACE).remote() for name in names]

    def send(actor, step, rank, world=2, damaged=False):
        sent = payload(step)
        its = digest(sent)
        if damaged:
            sent = sent.copy()
            sent[-1] ^= 1
        ray.get(actor.put.remote((1, step), rank, world, its, sent))

    send(actors[0], 8, 0)
    send(actors[1], 8, 1)
    send(actors[0], 9, 0)
    send(actors[1], 9, 1, damaged=True)
    ray.kill(actors[2])
    found = _newest(names, after=5)
    assert found is not None and (found.step, found.world, found.homes) == (8, 2, ["keeper-a", "keeper-b"])
    assert _newest(names, after=8) is None  # the disk has that one already
    send(actors[0], 9, 1)  # the same part, whole, on the other keeper
    assert _newest(names, after=5).step == 9


def test_a_keeper_starts_without_torch():
    program = "import sys, manta.keeper; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
