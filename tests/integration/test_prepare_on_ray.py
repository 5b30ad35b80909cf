"""Preparation as a Ray Data job: the same bytes as in one process, whatever the number of tasks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from manta.config import Config
from manta.data import prepare
from manta.data.prepare import Prepared
from manta.errors import UserError
from tiny import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

LINES, CELLS = 14_000, 6_000  # rows of two datasets: 4 and 2 shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on_ray")
    tiny_tokenizer(folder / "model")
    with (folder / "lines.jsonl").open("w") as file:
        for number in range(LINES):
            words = " and more" * (number // 2 % 5)
            row = {"instruction": f"Say {number // 2}{words}.", "output": f"It is {number // 2}{words}."}
            file.write("{broken\n" if number % 1000 == 3 else "\n" if number % 1000 == 4 else json.dumps(row) + "\n")
    with (folder / "cells.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "output"])
        writer.writerows((f"Repeat\n{number}", f"{number}" * (number % 40)) for number in range(CELLS))
    return folder


def prepared_in(folder: Path, data_dir: str, here: bool = False, num_proc: int = 1, **settings: object) -> Prepared:
    config = Config.from_dict(
        {
            "hf_model_id": str(folder / "model"),
            "data_dir": str(folder / data_dir),
            "packing": True,
            "max_seq_length": 96,
            "hf_dataset_config": {
                "num_proc": num_proc,
                "mixture": [
                    {"dataset_name": str(folder / "lines.jsonl"), "weight": 1.5},
                    {"dataset_name": str(folder / "cells.csv")},
                ],
            },
            **settings,
        }
    )
    prepared, parts = prepare.locate(config)
    told: list[tuple[int, int]] = []
    job = prepare.open_job(config, prepared)
    prepare.prepare(config, prepared, parts, job, lambda done, total: told.append((done, total)), here=here)
    assert told[-1] == (LINES + CELLS, LINES + CELLS) and told == sorted(told) and len(told) == 6
    assert [path.name for path in (folder / data_dir).iterdir()] == [prepared.path.name]
    return prepared


def test_one_task_two_tasks_and_none_write_the_same_bytes(folder):
    alone = prepared_in(folder, "here", here=True)
    about = alone.about
    assert len([name for name in about["files"] if name.startswith("tokenized/training")]) == 6
    assert about["counts"]["quarantined"] == 14
    assert {"blank_line", "empty_output", "truncated", "duplicates", "overlap"} <= about["counts"]["noted"].keys()
    for tasks in (1, 2):
        other = prepared_in(folder, f"tasks-{tasks}", num_proc=tasks)
        assert other.path.name == alone.path.name
        assert other.about["files"] == about["files"]
        assert other.about == about


def test_an_error_in_a_task_is_one_message_and_leaves_nothing(folder):
    with pytest.raises(UserError, match=r"^A sample has \d+ tokens, over max_seq_length 96"):
        prepared_in(folder, "error", num_proc=2, overlong_policy="error")
    assert list((folder / "error").iterdir()) == []
