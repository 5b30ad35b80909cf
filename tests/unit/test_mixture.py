"""Several datasets in one: each with its own format, templates and weight, written as a recipe."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from manta.config import Config
from manta.data import prepare
from manta.data.batches import Rows
from manta.data.prepare import Prepared
from manta.data.tokenize import load_tokenizer
from manta.errors import ConfigError, UserError
from tiny import EOS, tiny_tokenizer

SUMS, FACTS, TALKS = 60, 80, 40  # rows of each dataset
TURNS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    f"{{% if message.role == 'assistant' %}}{EOS}{{% endif %}}{{{{ '\\n' }}}}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    tiny_tokenizer(folder / "model")
    (folder / "turns.jinja").write_text(TURNS)
    sums = [{"q": f"{number} and {number}?", "a": f"The sum is {2 * number}."} for number in range(SUMS)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    with (folder / "facts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output"])
        writer.writerows((f"Say {number}.", "", f"It is {number}.") for number in range(FACTS))
    talks = [
        [{"role": "user", "content": f"Hello {number}!"}, {"role": "assistant", "content": f"Hello, {number} too."}]
        for number in range(TALKS)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return folder


def recipe(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "hf_model_id": str(folder / "model"),
        "max_seq_length": 128,
        "packing": True,
        "chat_template": str(folder / "turns.jinja"),
        "data_dir": str(folder / "prepared"),
        "hf_dataset_config": {
            "train_split_ratio": 0.8,
            "val_test_split_ratio": 0.5,
            "mixture": [
                {
                    "dataset_name": str(folder / "sums.jsonl"),
                    "input_template": "Question: {q}\n",
                    "output_template": "{a}",
                    "weight": 2,
                },
                {"dataset_name": str(folder / "facts.csv"), "weight": 0.5},
                {"dataset_name": str(folder / "talks.jsonl")},
            ],
        },
        **settings,
    }


def with_mixture(folder: Path, mixture: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    values = recipe(folder, **settings)
    return {**values, "hf_dataset_config": {**values["hf_dataset_config"], "mixture": mixture}}


def load(folder: Path, values: dict[str, Any]) -> Config:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return Config.load(folder / "recipe.yaml")


def prepared_here(config: Config) -> Prepared:
    prepared, parts = prepare.locate(config)
    prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
    return prepared


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Prepared:
    return prepared_here(load(folder, recipe(folder)))


def records(prepared: Prepared, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in prepared.text(split).read_text().splitlines()]


def of_source(row: int) -> str:
    return "sums" if row < SUMS else "facts" if row < SUMS + FACTS else "talks"


def seen(prepared: Prepared) -> Counter[int]:
    """Training row → how often an epoch sees it."""
    packs = prepared.packs()
    rows = Rows(prepared.tokenized("training"), packs)
    return Counter(row for index in range(len(rows)) for row in rows.sources(index))


def test_each_dataset_is_read_in_its_own_way(prepared):
    wanted = {
        "sums": lambda number: {"input": f"Question: {number} and {number}?\n", "output": f"The sum is {2 * number}."},
        "facts": lambda number: {
            "input": f"### Instruction:\nSay {number}.\n### Input:\n\n### Response:\n",
            "output": f"It is {number}.",
        },
        "talks": lambda number: {
            "input": f"user: Hello {number}!\nassistant: ",
            "output": f"Hello, {number} too.",
        },
    }
    firsts = {"sums": 0, "facts": SUMS, "talks": SUMS + FACTS}
    found = [record for split in ("training", "validation", "test") for record in records(prepared, split)]
    assert sorted(record["row"] for record in found) == list(range(SUMS + FACTS + TALKS))
    for record in found:
        name = of_source(record["row"])
        expected = wanted[name](record["row"] - firsts[name])
        assert {key: record[key] for key in expected} == expected


def test_the_tokens_are_those_of_the_texts(prepared, folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    texts = {record["row"]: record for record in records(prepared, "training")}
    for sample in prepared.tokenized("training"):
        record = texts[sample["row"]]
        text = tokenizer.decode(sample["input_ids"])
        assert text.rstrip("\n") == record["input"] + record["output"] + EOS
        trained = [label for label in sample["labels"] if label >= 0]
        assert tokenizer.decode(trained).rstrip("\n") == record["output"] + EOS


def test_the_manifest_names_each_source_with_its_first_row(prepared, folder):
    assert prepared.about["sources"] == [
        {"name": str(folder / "sums.jsonl"), "format": "template", "columns": ["q", "a"], "first_row": 0},
        {
            "name": str(folder / "facts.csv"),
            "format": "alpaca",
            "columns": ["instruction", "input", "output"],
            "first_row": SUMS,
        },
        {"name": str(folder / "talks.jsonl"), "format": "messages", "columns": ["messages"], "first_row": SUMS + FACTS},
    ]


def test_an_epoch_sees_training_rows_as_often_as_their_weight_says(prepared):
    rows = {name: set() for name in ("sums", "facts", "talks")}
    for row in prepared.tokenized("training")["row"]:
        rows[of_source(row)].add(row)
    assert min(len(found) for found in rows.values()) > 10
    times = seen(prepared)
    assert {times[row] for row in rows["sums"]} == {2}
    assert {times[row] for row in rows["talks"]} == {1}
    assert Counter(times[row] for row in rows["facts"])[1] == round(len(rows["facts"]) / 2)
    assert {times[row] for row in rows["facts"]} == {0, 1}
    assert prepared.counts["training"]["sequences"] == len(prepared.packs())
    assert prepared.counts["training"]["samples"] == sum(len(found) for found in rows.values())


def test_validation_rows_are_there_once_whatever_their_weight(prepared):
    rows = list(prepared.tokenized("validation")["row"])
    assert len(rows) == len(set(rows)) == prepared.counts["validation"]["rows"] == 18
    assert {of_source(row) for row in rows} == {"sums", "facts", "talks"}
    assert not set(rows) & set(seen(prepared))


def test_weights_without_packing_give_each_sample_a_sequence(folder, tmp_path):
    alone = prepared_here(load(tmp_path, recipe(folder, packing=False, data_dir=str(tmp_path / "prepared"))))
    packs = alone.packs()
    assert (np.diff(packs.offsets) == 1).all()
    assert alone.counts["training"]["sequences"] == len(packs) == sum(seen(alone).values())
    assert "fill" not in alone.counts["training"]
    assert {times for row, times in seen(alone).items() if of_source(row) == "sums"} == {2}


def test_equal_weights_of_one_need_no_packs(folder, tmp_path):
    mixture = [{**part, "weight": 1} for part in recipe(folder)["hf_dataset_config"]["mixture"]]
    values = with_mixture(folder, mixture, packing=False, data_dir=str(tmp_path / "prepared"))
    plain = prepared_here(load(tmp_path, values))
    assert plain.packs() is None
    assert plain.counts["training"]["sequences"] == plain.counts["training"]["samples"]


def test_the_seed_draws_other_rows_of_a_weight_below_one(folder, prepared, tmp_path):
    other = prepared_here(load(tmp_path, recipe(folder, seed=5, data_dir=str(tmp_path / "prepared"))))
    assert {row for row in seen(other) if of_source(row) == "facts"} != {
        row for row in seen(prepared) if of_source(row) == "facts"
    }


def test_each_part_shapes_the_folder(folder, prepared):
    sums, facts, talks = recipe(folder)["hf_dataset_config"]["mixture"]
    mixtures = [
        [{**sums, "weight": 3}, facts, talks],
        [sums, {**facts, "weight": 0.25}, talks],
        [sums, facts, {**talks, "train_on": "last"}],
        [sums, facts, sums],
        [facts, sums, talks],
        [sums, facts],
    ]
    others = {prepare.locate(load(folder, with_mixture(folder, mixture)))[0].path for mixture in mixtures}
    assert len(others) == len(mixtures) and prepared.path not in others
    assert prepare.locate(load(folder, with_mixture(folder, [sums, facts, talks])))[0] == prepared


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"input_template": "{q}"}, r"mixture\[0\] has no dataset_name"),
        ({"dataset_name": "x.jsonl", "wait": 2}, r"mixture\[0\]: wait: Extra inputs are not permitted"),
        ({"dataset_name": "x.jsonl", "weight": 0}, r"mixture\[0\]: weight: .*greater than 0"),
        ({"dataset_name": "x.jsonl", "train_split_ratio": 0.5}, r"mixture\[0\] sets \['train_split_ratio'\]"),
    ],
)
def test_a_wrong_part_is_named(folder, part, message):
    with pytest.raises(ConfigError, match=message):
        load(folder, with_mixture(folder, [part]))


def test_weights_that_leave_nothing_are_one_error(folder, tmp_path):
    sums, *_ = recipe(folder)["hf_dataset_config"]["mixture"]
    values = with_mixture(folder, [{**sums, "weight": 0.001}], data_dir=str(tmp_path / "prepared"))
    with pytest.raises(UserError, match="Raise a weight"):
        prepared_here(load(tmp_path, values))
    assert list((tmp_path / "prepared").glob("*")) == []
