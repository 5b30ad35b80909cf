from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from manta.data.batches import MASKED, EvalBatches, Rows, SampleOrder, TrainBatches, collate
from manta.data.tokenize import IGNORE

WORLDS = [1, 2, 3, 4, 5]


def order_of(rows=13, batch=2, micro_batches=4, seed=7):
    return SampleOrder(rows, batch, micro_batches, seed)


def steps_of(order, world_size, steps, start=0):
    """Per step, the micro-batches of all ranks in slot order, the fully masked ones left out."""
    ranks = [list(TrainBatches(order, start, steps, rank, world_size)) for rank in range(world_size)]
    per_step = -(-order.micro_batches // world_size)
    return [
        [
            ranks[rank][step * per_step + slot]
            for slot in range(per_step)
            for rank in range(world_size)
            if ranks[rank][step * per_step + slot] != [MASKED]
        ]
        for step in range(steps - start)
    ]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 7, 8])
def test_every_step_holds_the_same_rows_whatever_the_number_of_workers(world_size, micro_batches):
    order = order_of(micro_batches=micro_batches)
    alone = [[order.micro_batch(step, index) for index in range(micro_batches)] for step in range(6)]
    assert steps_of(order, 1, 6) == alone
    assert steps_of(order, world_size, 6) == alone


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 7, 8])
def test_all_ranks_have_equally_many_batches_in_every_step(world_size, micro_batches):
    """A rank with fewer would leave the others waiting in a collective."""
    order = order_of(micro_batches=micro_batches)
    ranks = [TrainBatches(order, 0, 5, rank, world_size) for rank in range(world_size)]
    assert {len(list(rank)) for rank in ranks} == {len(rank) for rank in ranks} == {5 * ranks[0].per_step}
    masked = sum(batch == [MASKED] for rank in ranks for batch in rank)
    assert masked == 5 * (ranks[0].per_step * world_size - micro_batches)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 5),
    micro_batches=st.integers(1, 6),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_every_epoch_visits_each_row_once(rows, batch, micro_batches, world_size, seed):
    order = SampleOrder(rows, batch, micro_batches, seed)
    steps = -(-3 * rows // (batch * micro_batches))
    stream = [row for step in steps_of(order, world_size, steps) for micro_batch in step for row in micro_batch]
    for epoch in range(3):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_every_micro_batch_is_full_also_across_epochs():
    order = order_of(rows=3, batch=2, micro_batches=2)
    assert all(len(order.micro_batch(step, index)) == 2 for step in range(9) for index in range(2))


def test_another_seed_or_epoch_gives_another_order():
    def stream(seed):
        return [row for step in steps_of(order_of(rows=50, batch=5, micro_batches=2, seed=seed), 1, 10) for row in step]

    first, other = stream(7), stream(8)
    assert first == stream(7)
    assert first != other
    assert first[:10] != first[10:]
    assert stream(7)[:10] != [list(range(start, start + 5)) for start in range(0, 50, 5)]


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_resume_goes_on_where_the_steps_ended(world_size):
    order = order_of()
    for rank in range(world_size):
        whole = TrainBatches(order, 0, 9, rank, world_size)
        resumed = TrainBatches(order, 4, 9, rank, world_size)
        assert list(resumed) == list(whole)[4 * whole.per_step :]
        assert len(resumed) == len(whole)


def test_a_resume_on_other_workers_goes_on_with_the_same_rows():
    order = order_of(micro_batches=6)
    whole = steps_of(order, 1, 9)
    for before, after in [(1, 4), (4, 1), (2, 5), (5, 3)]:
        assert steps_of(order, before, 4) + steps_of(order, after, 9, start=4) == whole


def test_epochs_counts_passes_over_the_data():
    order = order_of(rows=16, batch=2, micro_batches=4)
    assert order.epochs(0) == 0
    assert order.epochs(1) == 0.5
    assert order.epochs(4) == 2


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 60), batch=st.integers(1, 7), world_size=st.integers(1, 5))
def test_evaluation_covers_each_row_once_and_keeps_ranks_in_step(rows, batch, world_size):
    ranks = [EvalBatches(rows, batch, rank, world_size) for rank in range(world_size)]
    batches = [list(rank) for rank in ranks]
    assert {len(found) for found in batches} == {len(rank) for rank in ranks}
    seen = Counter(row for found in batches for rows_of_batch in found for row in rows_of_batch)
    seen.pop(MASKED, None)
    assert seen == Counter(range(rows))
    assert all(0 < len(rows_of_batch) <= batch for found in batches for rows_of_batch in found)


SAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]},
    {"input_ids": [8], "labels": [IGNORE]},
    {"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORE, IGNORE, IGNORE, 4, 5]},
]


def test_rows_come_by_number_and_the_masked_one_trains_nothing():
    rows = Rows(SAMPLES)
    assert len(rows) == 3
    assert {name: list(value) if name in SAMPLES[2] else value for name, value in rows[2].items()} == {
        **SAMPLES[2],
        "row": 2,
        "starts": [0],
    }
    assert rows[MASKED]["row"] == MASKED
    assert set(rows[MASKED]["labels"]) == {IGNORE}


def test_the_first_token_of_a_row_is_never_a_target():
    row = Rows([{"input_ids": [5, 6], "labels": [5, 6]}])[0]
    assert row["labels"].tolist() == [IGNORE, 6]


def test_a_batch_is_padded_to_its_longest_row():
    batch = collate([Rows(SAMPLES)[index] for index in (0, 2)], pad_token_id=99)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 5),
        "labels": (2, 5),
        "attention_mask": (2, 5),
        "rows": (2,),
        "tokens": (),
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].tolist() == [[5, 6, 7, 99, 99], [1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["rows"].tolist() == [0, 2]
    assert batch["tokens"] == 8


def test_an_eos_that_is_also_padding_is_still_trained():
    """Labels are masked by position, never by the padding's id."""
    rows = Rows([{"input_ids": [5, 9], "labels": [IGNORE, 9]}, {"input_ids": [5], "labels": [IGNORE]}])
    batch = collate([rows[0], rows[1]], pad_token_id=9)
    assert batch["labels"].tolist() == [[IGNORE, 9], [IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def loss_and_gradient(indices):
    """Summed next-token loss of a linear model over token embeddings, and its gradient."""
    torch.manual_seed(0)
    weight = torch.randn(100, 100, requires_grad=True)
    batch = collate([Rows(SAMPLES)[index] for index in indices], pad_token_id=99)
    logits = weight[batch["input_ids"]][:, :-1].reshape(-1, 100)
    targets = batch["labels"][:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss.item(), weight.grad


def test_a_masked_row_adds_neither_loss_nor_gradient():
    loss, gradient = loss_and_gradient([0, 2])
    with_masked, its_gradient = loss_and_gradient([0, MASKED, 2])
    assert with_masked == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(gradient, its_gradient)
    loss, gradient = loss_and_gradient([MASKED])
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_in_order(workers):
    order = order_of(rows=3, batch=2, micro_batches=3)
    batches = TrainBatches(order, 1, 4, rank=1, world_size=2)
    loader = DataLoader(
        Rows(SAMPLES), batch_sampler=batches, collate_fn=partial(collate, pad_token_id=0), num_workers=workers
    )
    assert [batch["rows"].tolist() for batch in loader] == list(batches)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    batch=st.integers(1, 5),
    micro_batches=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_a_step_has_the_same_rows_dealt_by_length_or_not(lengths, batch, micro_batches, seed):
    plain = SampleOrder(len(lengths), batch, micro_batches, seed)
    dealt = SampleOrder(len(lengths), batch, micro_batches, seed, np.array(lengths))
    for step in range(5):
        micros = [dealt.micro_batch(step, index) for index in range(micro_batches)]
        assert all(len(micro) == batch for micro in micros)
        assert sorted(row for micro in micros for row in micro) == sorted(plain.step(step))


def test_micro_batches_have_about_as_many_tokens():
    """Skewed lengths, as of instructions: of the slowest micro-batch of each step, a fifth less."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 4000).astype(int)

    def slowest(order):
        tokens = [[lengths[order.micro_batch(step, index)].sum() for index in range(4)] for step in range(100)]
        return np.max(tokens, axis=1).sum() / np.mean(tokens, axis=1).sum()

    plain = slowest(SampleOrder(len(lengths), 4, 4, 7))
    dealt = slowest(SampleOrder(len(lengths), 4, 4, 7, lengths))
    assert dealt < 1.15 and dealt < 0.8 * plain
