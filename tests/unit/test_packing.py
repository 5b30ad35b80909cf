"""Which samples share a sequence, how often an epoch sees them, and what the model is handed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.batches import MASKED, Rows, collate
from manta.data.packing import GROUP_TOKENS, Packs, fill, pack, repeated
from manta.data.tokenize import IGNORE


def members(packs: Packs) -> list[list[int]]:
    return [packs[index] for index in range(len(packs))]


def skewed(count: int, capacity: int, seed: int = 0) -> np.ndarray:
    """Lengths as chat data has them: many short samples, few long ones, some cut at the capacity."""
    drawn = np.random.default_rng(seed).lognormal(np.log(capacity / 8), 1.0, count)
    return drawn.astype(np.int64).clip(1, capacity)


def first_fit(lengths: np.ndarray, capacity: int) -> int:
    """Packs that the simplest rule needs: each sample, in order, into the first pack with room."""
    room: list[int] = []
    for length in lengths.tolist():
        index = next((index for index, left in enumerate(room) if left >= length), len(room))
        room[index:] = [capacity - length] if index == len(room) else [room[index] - length, *room[index + 1 :]]
    return len(room)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_packs_hold_every_sample_once_and_never_more_than_their_capacity(data):
    capacity = data.draw(st.integers(1, 40))
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)))
    packs = members(pack(lengths, np.arange(len(lengths)), capacity))
    assert sorted(sample for each in packs for sample in each) == list(range(len(lengths)))
    assert all(each and lengths[each].sum() <= capacity for each in packs)


def test_a_sample_that_is_to_be_packed_twice_is_there_twice_and_one_that_is_not_is_not():
    lengths = np.array([5, 9, 3, 10, 2])
    packs = members(pack(lengths, np.array([0, 0, 2, 4, 4, 4]), 10))
    assert Counter(sample for each in packs for sample in each) == {0: 2, 2: 1, 4: 3}
    assert all(lengths[each].sum() <= 10 for each in packs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [512, 2048])
def test_packs_are_full_and_no_more_than_first_fit_needs(seed, capacity):
    lengths = skewed(1500, capacity, seed)
    packs = pack(lengths, np.arange(len(lengths)), capacity)
    assert fill(packs, lengths, capacity) == lengths.sum() / (len(packs) * capacity) >= 0.95
    assert -(-lengths.sum() // capacity) <= len(packs) <= first_fit(lengths, capacity)


def test_more_samples_than_a_group_holds_are_all_packed_and_as_full():
    lengths = skewed(14_000, 4096)
    assert lengths.sum() > 2 * GROUP_TOKENS
    packs = pack(lengths, np.arange(len(lengths)), 4096)
    assert np.array_equal(np.sort(packs.samples), np.arange(len(lengths)))
    assert np.add.reduceat(lengths[packs.samples], packs.offsets[:-1]).max() <= 4096
    assert fill(packs, lengths, 4096) >= 0.95


def test_samples_of_the_full_length_have_a_pack_of_their_own():
    lengths = np.array([8, 8, 8])
    assert sorted(members(pack(lengths, np.arange(3), 8))) == [[0], [1], [2]]


def test_equal_input_gives_equal_packs_to_the_byte(tmp_path):
    lengths = skewed(800, 512)
    for name in ("one.npz", "other.npz"):
        pack(lengths, np.arange(len(lengths)), 512).save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()


def test_packs_are_read_back_as_they_were_saved(tmp_path):
    packs = pack(np.array([4, 3, 6, 1]), np.arange(4), 7)
    packs.save(tmp_path / "packs.npz")
    again = Packs.load(tmp_path / "packs.npz")
    assert members(again) == members(packs)
    assert len(again) == len(packs) == 2
    assert all(isinstance(sample, int) for sample in again[0])


def test_tokens_of_a_pack_are_those_of_its_samples():
    lengths = np.array([5, 7, 11, 13])
    packs = Packs(np.array([0, 2, 3, 6]), np.array([3, 0, 1, 2, 2, 0]))
    expected = [sum(int(lengths[sample]) for sample in packs[index]) for index in range(len(packs))]
    assert packs.tokens(lengths).tolist() == expected == [18, 7, 27]
    assert Packs.singly(np.array([2, 2, 0])).tokens(lengths).tolist() == [11, 11, 5]


def test_singly_gives_each_sample_a_sequence():
    assert members(Packs.singly(np.array([4, 4, 0]))) == [[4], [4], [0]]


# --- How often an epoch sees a sample


@pytest.mark.parametrize(
    ("weight", "samples", "times"),
    [
        (1, 10, {1: 10}),
        (2, 10, {2: 10}),
        (3, 4, {3: 4}),
        (0.5, 10, {0: 5, 1: 5}),
        (1.5, 10, {1: 5, 2: 5}),
        (0.25, 1000, {0: 750, 1: 250}),
        (2.1, 1000, {2: 900, 3: 100}),
        (0.01, 10, {0: 10}),
    ],
)
def test_a_weight_is_how_often_its_samples_are_seen(weight, samples, times):
    seen = Counter(repeated(np.full(samples, float(weight)), seed=3).tolist())
    assert Counter(seen[sample] for sample in range(samples)) == times


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 2.75]), st.integers(1, 50)), min_size=1, max_size=5),
    st.integers(0, 2**32),
)
def test_in_a_mixture_each_weight_keeps_its_share_and_the_order_of_the_source(parts, seed):
    weights = np.concatenate([np.full(count, weight) for weight, count in parts])
    epoch = repeated(weights, seed)
    assert np.array_equal(epoch, np.sort(epoch))
    seen = np.bincount(epoch, minlength=len(weights))
    for weight in np.unique(weights):
        of_this = seen[weights == weight]
        assert set(of_this) <= {int(weight), int(weight) + (weight % 1 > 0)}
        assert of_this.sum() == int(weight) * len(of_this) + round(weight % 1 * len(of_this))


def test_the_draw_follows_the_seed():
    weights = np.repeat([1.0, 0.5, 1.5], 100)
    assert np.array_equal(repeated(weights, 1), repeated(weights, 1))
    assert not np.array_equal(repeated(weights, 1), repeated(weights, 2))
    assert np.array_equal(repeated(weights, 1)[:100], np.arange(100))


def test_half_of_the_samples_are_drawn_from_everywhere():
    drawn = repeated(np.full(1000, 0.5), seed=0)
    assert len(np.unique(drawn)) == 500
    assert 200 <= (drawn < 500).sum() <= 300


# --- Sequences and batches

SAMPLES = [
    {"input_ids": np.array([5, 6, 7]), "labels": np.array([IGNORE, 6, 7]), "row": 10},
    {"input_ids": np.array([8, 9]), "labels": np.array([8, 9]), "row": 11},
    {"input_ids": np.array([1, 2, 3, 4]), "labels": np.array([1, IGNORE, 3, 4]), "row": 13},
    {"input_ids": np.array([7]), "labels": np.array([7]), "row": 17},
]
PACKS = Packs(np.array([0, 2, 4, 5]), np.array([2, 0, 1, 3, 1]))  # [2, 0], [1, 3], [1]


def test_a_sequence_is_its_documents_one_after_the_other():
    rows = Rows(SAMPLES, PACKS)
    assert len(rows) == 3
    assert rows[0]["input_ids"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert rows[0]["starts"] == [0, 4]
    assert rows[0]["row"] == 0
    assert rows.members(0) == [2, 0]
    assert rows.sources(0) == [13, 10]
    assert rows.sources(2) == [11]


def test_the_first_token_of_a_document_is_no_target():
    rows = Rows(SAMPLES, PACKS)
    assert rows[0]["labels"].tolist() == [IGNORE, IGNORE, 3, 4, IGNORE, 6, 7]
    assert rows[1]["labels"].tolist() == [IGNORE, 9, IGNORE]
    assert Rows(SAMPLES)[1]["labels"].tolist() == [IGNORE, 9]
    assert SAMPLES[1]["labels"].tolist() == [8, 9]  # what is read is a copy


def test_without_packs_a_sequence_is_a_sample():
    rows = Rows(SAMPLES)
    assert len(rows) == 4
    assert (rows.members(2), rows.sources(2), rows[2]["starts"]) == ([2], [13], [0])
    assert rows[2]["input_ids"].tolist() == [1, 2, 3, 4]


def test_positions_restart_with_each_document_and_with_the_padding():
    rows = Rows(SAMPLES, PACKS)
    batch = collate([rows[index] for index in range(3)], pad_token_id=99, layout="packed")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 7, 99, 99, 99, 99], [8, 9, 99, 99, 99, 99, 99]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [
        [IGNORE, IGNORE, 3, 4, IGNORE, 6, 7],
        [IGNORE, 9, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE],
        [IGNORE, 9, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    assert batch["rows"].tolist() == [0, 1, 2]
    assert int(batch["tokens"]) == 7 + 3 + 2
    # An attention mask would tell transformers not to look at the positions for documents.
    assert "attention_mask" not in batch
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_unpacked_batches_have_a_mask_and_leave_positions_to_the_model():
    batch = collate([Rows(SAMPLES)[index] for index in (0, 2)], pad_token_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert "position_ids" not in batch


@pytest.mark.parametrize("packs", [None, PACKS])
def test_the_masked_row_trains_nothing(packs):
    rows = Rows(SAMPLES, packs)
    batch = collate([rows[MASKED]], pad_token_id=0, layout="padded" if packs is None else "packed")
    assert batch["rows"].tolist() == [MASKED]
    assert batch["input_ids"].shape == (1, 1)
    assert batch["labels"].tolist() == [[IGNORE]]
    if packs:
        assert batch["position_ids"].tolist() == [[0]]


def test_rows_of_a_memory_mapped_dataset_are_packed_too(tmp_path):
    from datasets import Dataset

    table = Dataset.from_list([{name: np.asarray(value).tolist() for name, value in row.items()} for row in SAMPLES])
    table.save_to_disk(str(tmp_path))
    rows = Rows(Dataset.load_from_disk(str(tmp_path)).with_format("numpy"), PACKS)
    ours = Rows(SAMPLES, PACKS)
    for index in range(3):
        for name in ("input_ids", "labels", "starts"):
            assert list(rows[index][name]) == list(ours[index][name])
        assert rows.sources(index) == ours.sources(index)
