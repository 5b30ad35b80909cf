"""Runs on packed sequences: what a step takes and counts, and that it trains as on the samples one by one."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from manta import ledger
from manta.data.batches import Rows
from manta.data.prepare import Prepared
from manta.train import train
from running import logged, max_gap, run_of, small_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

LENGTH, SEQUENCES, SAMPLES = 192, 22, 72  # three or four samples to a sequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packing")


@pytest.fixture(scope="module")
def epoch(folder: Path, ray_cluster: None) -> dict[str, Any]:
    """One epoch on two workers, two sequences to each of four micro-batches a step."""
    return train(
        small_config(folder, packing=True, max_seq_length=LENGTH, num_train_epochs=1, eval_steps=3, save_steps=3)
    )


def test_the_manifest_says_how_many_sequences_there_are_and_how_full(epoch):
    prepared = Prepared(run_of(epoch).prepared())
    figures, packs = prepared.counts["training"], prepared.packs()
    assert (figures["samples"], figures["sequences"], len(packs)) == (SAMPLES, SEQUENCES, SEQUENCES)
    assert figures["fill"] == pytest.approx(figures["tokens"] / (SEQUENCES * LENGTH), abs=1e-4)
    assert figures["fill"] > 0.9
    assert all(len(packs[index]) >= 3 for index in range(len(packs) - 1))


def test_an_epoch_is_over_when_each_sequence_was_seen(epoch):
    run = run_of(epoch)
    assert epoch["status"] == "finished"
    assert epoch["steps"] == epoch["max_steps"] == math.ceil(SEQUENCES / 8) == 3
    assert epoch["epoch"] == pytest.approx(3 * 8 / SEQUENCES, abs=1e-3)
    taken = ledger.read(run.ledger, 3)
    assert [(step, index) for step, index, _ in taken] == [(step, index) for step in range(3) for index in range(4)]
    stream = [row for _, _, rows in taken for row in rows]
    assert len(stream) == 3 * 8 and set(stream) == set(range(SEQUENCES))  # the last step begins the next epoch

    prepared = Prepared(run.prepared())
    rows = Rows(prepared.tokenized("training"), prepared.packs())
    seen = Counter(source for row in set(stream) for source in rows.sources(row))
    assert seen == Counter(prepared.tokenized("training")["row"])


def test_the_tokens_counted_are_those_of_the_samples(epoch):
    run = run_of(epoch)
    prepared = Prepared(run.prepared())
    rows = Rows(prepared.tokenized("training"), prepared.packs())
    lengths = [sum(len(rows.samples[member]["input_ids"]) for member in rows.members(row)) for row in range(len(rows))]
    taken = [row for _, _, found in ledger.read(run.ledger, 3) for row in found]
    assert epoch["tokens"] == sum(lengths[row] for row in taken)
    assert sum(lengths) == prepared.counts["training"]["tokens"] < SEQUENCES * LENGTH


def test_it_learns_and_is_evaluated_on_single_samples(epoch):
    run = run_of(epoch)
    losses = logged(run, "loss")
    assert losses[3] < losses[1]
    assert logged(run, "eval_loss")[3] == epoch["best_metric"] < losses[1]


def test_a_step_over_all_samples_is_the_same_packed_or_not(folder):
    """Eleven packed micro-batches on two workers: one of them gets a masked one at the end."""
    runs = {}
    for packing, count in ((True, SEQUENCES), (False, SAMPLES)):
        config = small_config(
            folder,
            packing=packing,
            max_seq_length=LENGTH,
            max_steps=1,
            nominal_workers=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=count // 2,
            full_ft=True,
            eval_steps=0,
        )
        runs[packing] = run_of(train(config))
        assert Prepared(runs[packing].prepared()).counts["training"]["sequences"] == count
    packed, single = runs[True], runs[False]
    assert max_gap(logged(packed, "loss"), logged(single, "loss")) <= 1e-5
    assert max_gap(logged(packed, "grad_norm"), logged(single, "grad_norm")) <= 1e-4
    assert logged(packed, "grad_norm")[1] > 0.1


@pytest.mark.parametrize("full_ft", [False, True], ids=["lora", "full"])
def test_a_fused_loss_trains_alike(folder, full_ft):
    """On sharded weights, of which the output matrix is whole only inside the model."""
    asked = {"full_ft": full_ft, "max_steps": 4, "eval_steps": 4}
    runs = {
        how: run_of(train(small_config(folder, run_name=f"fused-{how}-{full_ft}", fused_loss=how, **asked)))
        for how in ("on", "off")
    }
    assert [event["fused_loss"] for how in runs for event in runs[how].events() if event["kind"] == "setup"] == [
        True,
        False,
    ]
    for name, near in (("loss", 1e-5), ("eval_loss", 1e-5), ("grad_norm", 1e-4)):
        assert max_gap(logged(runs["on"], name), logged(runs["off"], name)) <= near
    assert logged(runs["on"], "grad_norm")[1] > 0.1
