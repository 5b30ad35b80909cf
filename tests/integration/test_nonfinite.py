"""A NaN is stopped at its step: it reaches neither the weights nor a checkpoint, and is not tried again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from manta.config import Config
from manta.data.source import SPLITS, assign_splits
from manta.errors import TrainingError
from manta.runs import Run
from manta.train import train
from running import lines, logged, max_difference, order_of, prepared_of, small_config, weights
from tiny import tiny_model
from troubleshooting import check

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def spoil(folder: Path, tensor: str, row: int, value: float) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state[tensor][row] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def failure(config: Config) -> tuple[Run, str]:
    with pytest.raises(TrainingError) as caught:
        train(config)
    return Run(Path(config.results_dir) / config.run_name), str(caught.value)


def source_rows(config: Config, step: int) -> set[int]:
    """Numbers, in the source, of the rows that `step` (from 0) trains on."""
    samples, order = prepared_of(config).tokenized("training"), order_of(config)
    batches = [order.micro_batch(step, index) for index in range(order.micro_batches)]
    return {samples[row]["row"] for batch in batches for row in batch}


def test_infinite_weight_of_the_base_stops_the_first_step(tmp_path):
    tiny_model(tmp_path / "base")
    spoil(tmp_path / "base", "model.layers.1.mlp.down_proj.weight", 3, float("inf"))
    run, message = failure(small_config(tmp_path, full_ft=True, run_name="spoiled", eval_steps=0, save_steps=1))
    assert "step 1 " in message and "nan" in message
    check("The gradient is NaN", message)
    assert run.result()["attempts"] == 1 and run.result()["status"] == "failed"
    assert list(run.path.glob("checkpoint_0*")) == []


def poison(folder: Path, number: int) -> None:
    """Make row `number` alone hold a word whose embedding is NaN."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    (rare,) = tokenizer("~")["input_ids"]
    rows = (folder / "rows.jsonl").read_text().splitlines()
    assert all(rare not in tokenizer(row)["input_ids"] for row in rows)
    rows[number] = rows[number].replace("the capital", "the ~ capital")
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    spoil(folder / "base", "model.embed_tokens.weight", rare, float("nan"))


def test_nan_in_the_evaluation_stops_before_the_next_save(tmp_path):
    tiny_model(tmp_path / "base", tie_word_embeddings=False)
    config = small_config(tmp_path, run_name="unseen", eval_steps=4, save_steps=3)
    splits = assign_splits(96, config.hf_dataset_config, config.seed)
    poison(tmp_path, int((splits == SPLITS.index("validation")).nonzero()[0][0]))
    run, message = failure(config)
    assert "evaluation loss after step 4 is nan" in message
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [3]
    assert run.result()["attempts"] == 1


@pytest.mark.parametrize("clip", [1.0, 0])
def test_nan_from_one_row_stops_at_its_step_and_names_it(tmp_path, clip):
    """One word's embedding is NaN: training is well until the one row that has this word."""
    tiny_model(tmp_path / "base", tie_word_embeddings=False)
    config = small_config(
        tmp_path,
        run_name="rare",
        eval_steps=0,
        save_steps=1,
        max_grad_norm=clip,
        num_workers=2 if clip else 1,
        nominal_workers=2,
        max_failures=2,
        data={"train_split_ratio": 1.0},
    )
    poisoned = 17
    poison(tmp_path, poisoned)

    run, message = failure(config)
    named = {int(number) for number in re.search(r"rows \[([\d, ]+)\]", message).group(1).split(",")}
    step = int(re.search(r"step (\d+) is nan", message).group(1))
    assert step > 1
    assert poisoned in named and named == source_rows(config, step - 1)
    assert run.result()["attempts"] == 1
    assert [event["kind"] for event in lines(run.events_file)].count("attempt") == 1
    assert run.latest().step == step - 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(run, step - 1).values())
    assert list(logged(run, "loss")) == list(range(1, step))


def test_a_step_may_be_left_out(tmp_path):
    """The one poisoned step changes nothing; the others are as they would be."""
    tiny_model(tmp_path / "base", tie_word_embeddings=False)
    config = small_config(
        tmp_path,
        run_name="skipped",
        eval_steps=0,
        save_steps=1,
        save_total_limit=20,
        non_finite="skip",
        num_workers=2,
        data={"train_split_ratio": 1.0},
    )
    poison(tmp_path, 17)
    result = train(config)
    run = Run(Path(result["run"]))
    (note,) = [event for event in lines(run.events_file) if "skipped_step" in event]
    step = note["skipped_step"]
    assert result["status"] == "finished" and result["skipped_steps"] == 1
    assert f"step {step} is nan" in note["text"] and "17" in note["text"] and 17 in source_rows(config, step - 1)
    assert sorted(logged(run, "loss")) == [number for number in range(1, 13) if number != step]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(run, 12).values())
    assert max_difference(weights(run, step), weights(run, step - 1)) == 0
    assert max_difference(weights(run, step + 1), weights(run, step)) > 0


def test_five_steps_in_a_row_are_no_accident(tmp_path):
    tiny_model(tmp_path / "base")
    spoil(tmp_path / "base", "model.layers.1.mlp.down_proj.weight", 3, float("inf"))
    run, message = failure(small_config(tmp_path, run_name="hopeless", eval_steps=0, non_finite="skip"))
    assert "step 5 is nan" in message
    assert run.result()["skipped_steps"] == 4 and run.result()["attempts"] == 1
