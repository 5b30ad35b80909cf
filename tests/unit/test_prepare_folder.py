"""The folder of prepared data: made once, gone on with after a kill, the same bytes however it was made."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manta.config import Config
from manta.data import prepare, tasks
from manta.data.prepare import Prepared
from tiny import tiny_tokenizer

SHARDS = 10
SCRIPT = """
import json, sys
from manta.config import Config
from manta.data import prepare

config = Config.from_dict(json.loads(sys.argv[1]))
prepared, parts = prepare.locate(config)
prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
print(prepared.path)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer, 10 shards of rows, compressed so that they are first written out, and 3 shards as they are."""
    folder = tmp_path_factory.mktemp("prepare")
    tiny_tokenizer(folder / "model")
    with gzip.open(folder / "many.jsonl.gz", "wt", compresslevel=1) as many, (folder / "few.jsonl").open("w") as few:
        for number in range(40_000):
            line = json.dumps({"q": f"What is {number} and {number}?", "a": f"It is {2 * number}."}) + "\n"
            many.write("{broken\n" if number % 5000 == 7 else line)
            if number < 9000:
                few.write(line)
    return folder


def config_of(folder: Path, data_dir: Path, rows: str = "many.jsonl.gz", **data: Any) -> Config:
    return Config.from_dict(
        {
            "hf_model_id": str(folder / "model"),
            "data_dir": str(data_dir),
            "packing": True,
            "max_seq_length": 256,
            "hf_dataset_config": {
                "dataset_name": str(folder / rows),
                "input_template": "Question: {q}\n",
                "output_template": "{a}",
                **data,
            },
        }
    )


def process(config: Config) -> subprocess.Popen[str]:
    """A process of its own that prepares the data of `config` and prints the folder."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(config.to_dict())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def prepared_here(config: Config, **options: Any) -> Prepared:
    prepared, parts = prepare.locate(config)
    prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True, **options)
    return prepared


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Prepared:
    """Prepared without a disturbance."""
    prepared = prepared_here(config_of(folder, folder / "whole"))
    assert len(list((prepared.path / "tokenized" / "training").iterdir())) == SHARDS
    return prepared


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """The data_dir of a process that was killed while it prepared."""
    data_dir = folder / "killed"
    running = process(config_of(folder, data_dir))
    try:
        until = time.monotonic() + 120
        while len(list(data_dir.glob(".staging-*/done/*.json"))) < 3:
            assert running.poll() is None and time.monotonic() < until, running.communicate()
            time.sleep(0.002)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert 3 <= len(list(data_dir.glob(".staging-*/done/*.json"))) < SHARDS
    return data_dir


@pytest.fixture
def half_done(killed: Path, tmp_path: Path) -> Path:
    """A copy of what the killed process left."""
    shutil.copytree(killed, tmp_path / "data")
    assert len(list((tmp_path / "data").glob(".source-*"))) == 1
    return tmp_path / "data"


def arrows(folder: Path) -> dict[str, tuple[int, int]]:
    """Shard → inode and time of its training part."""
    found = sorted((folder / "tokenized" / "training").glob("part-*.arrow"))
    return {path.stem.removeprefix("part-"): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def staged(data_dir: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
    """(the staging folder, the parts of the shards that are done)."""
    (staging,) = data_dir.glob(".staging-*")
    done = {path.stem for path in (staging / "done").glob("[0-9]*.json")}
    return staging, {shard: part for shard, part in arrows(staging).items() if shard in done}


def test_after_a_kill_it_goes_on_with_the_shards_that_are_left(folder, whole, half_done):
    _, before = staged(half_done)
    told: list[int] = []
    prepared = prepared_here(config_of(folder, half_done), on_rows=lambda done, total: told.append(done))
    after = arrows(prepared.path)
    assert len(after) == SHARDS and before.items() <= after.items()
    assert told == [*range(4096, 40_000, 4096), 40_000]
    assert prepared.about == whole.about
    assert prepare.is_ready(prepared)
    assert left_in(half_done) == [prepared.path.name]  # nor what the killed process had unpacked


def test_a_part_that_is_cut_short_or_gone_is_made_again(folder, whole, half_done):
    staging, before = staged(half_done)
    cut, gone, *others = sorted(before)
    part = staging / "tokenized" / "training" / f"part-{cut}.arrow"
    part.write_bytes(part.read_bytes()[:-64])
    (staging / f"training.jsonl.part-{gone}").unlink()
    prepared = prepared_here(config_of(folder, half_done))
    after = arrows(prepared.path)
    assert all(after[shard] != before[shard] for shard in (cut, gone))
    assert others and all(after[shard] == before[shard] for shard in others)
    assert prepared.about == whole.about


def test_what_a_kill_at_the_end_leaves_does_no_harm(folder, whole, half_done):
    """Joined files, packs and a summary that was being written."""
    staging, before = staged(half_done)
    (staging / "training.jsonl").write_text("half of it")
    (staging / "packs.npz").write_bytes(b"half of it")
    (staging / "training.jsonl.part-000000.writing-1").write_text("half of it")
    (staging / "done" / f"{min(before)}.json").write_text('{"files": ')
    prepared = prepared_here(config_of(folder, half_done))
    assert prepared.about["files"] == whole.about["files"]
    assert sorted(whole.about["files"]) == sorted(
        str(path.relative_to(prepared.path))
        for path in prepared.path.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )


def test_bad_rows_are_put_aside_with_their_place(folder, whole):
    bad = [json.loads(line) for line in (whole.path / prepare.QUARANTINE).read_text().splitlines()]
    assert [each["row"] for each in bad] == list(range(7, 40_000, 5000))
    assert bad[0]["where"] == f"{folder / 'many.jsonl.gz'}, line 8"
    assert whole.counts["quarantined"] == 8
    assert sum(whole.counts[split]["rows"] for split in ("training", "validation", "test")) == 40_000 - 8


def test_two_processes_that_prepare_the_same_data_share_one_folder(folder, tmp_path):
    config = config_of(folder, tmp_path, "few.jsonl")
    both = [process(config) for _ in range(2)]
    for each in both:
        output, errors = each.communicate(timeout=120)
        assert each.returncode == 0, errors
        assert output.strip() == str(prepare.locate(config)[0].path)
    assert left_in(tmp_path) == [prepare.locate(config)[0].path.name]
    assert prepare.is_ready(prepare.locate(config)[0])


@pytest.fixture
def threads() -> Iterator[list[threading.Thread]]:
    started: list[threading.Thread] = []
    yield started
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()


def test_one_that_waits_and_one_that_comes_later_do_not_work_at_once(folder, tmp_path, threads):
    """Also when the one before them was interrupted, and took its lock file with it."""
    config = config_of(folder, tmp_path, "few.jsonl")
    first_works, first_ends, second_works, third_works = (threading.Event() for _ in range(4))
    met: list[bool] = []

    def first(done: int, total: int) -> None:
        first_works.set()
        first_ends.wait(30)
        raise KeyboardInterrupt

    def second(done: int, total: int) -> None:
        second_works.set()
        met.append(third_works.wait(0.5))

    def work(on_rows: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            prepared_here(config, on_rows=on_rows)

    def start(on_rows: Any) -> None:
        threads.append(threading.Thread(target=work, args=(on_rows,)))
        threads[-1].start()

    start(first)
    assert first_works.wait(30)
    start(second)
    time.sleep(0.5)  # until it waits
    assert not second_works.is_set()
    first_ends.set()
    assert second_works.wait(30)
    start(lambda done, total: third_works.set())
    for thread in threads:
        thread.join(60)
    assert met == [False] * 3  # one shard each
    assert prepare.is_ready(prepare.locate(config)[0])
    assert left_in(tmp_path) == [prepare.locate(config)[0].path.name]


def test_an_unchanged_second_start_takes_the_folder_at_once(folder, whole, tmp_path):
    config = config_of(folder, folder / "whole")
    (tmp_path / "recipe.yaml").write_text(config.dump())
    manta = Path(sys.executable).with_name("manta")
    before = (whole.path / "manifest.json").stat().st_mtime_ns
    start = time.monotonic()
    done = subprocess.run(
        [manta, "prepare", "--config", tmp_path / "recipe.yaml"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 5  # without torch, Ray or the rows
    assert done.stdout.strip() == str(whole.path)
    assert (whole.path / "manifest.json").stat().st_mtime_ns == before
    assert left_in(folder / "whole") == [whole.path.name]


def test_one_other_character_in_a_template_gives_another_folder(folder, whole):
    assert prepare.is_ready(prepare.locate(config_of(folder, folder / "whole"))[0])
    for changed in ({"input_template": "Question: {q} \n"}, {"output_template": "{a}!"}):
        other, _ = prepare.locate(config_of(folder, folder / "whole", **changed))
        assert other != whole and not prepare.is_ready(other)


def test_a_damaged_folder_is_made_anew(folder, tmp_path):
    config = config_of(folder, tmp_path, "few.jsonl")
    prepared = prepared_here(config)
    about = prepared.about
    part = prepared.path / "tokenized" / "training" / "part-000001.arrow"
    part.write_bytes(part.read_bytes()[:-1])
    (prepared.path / "stray.txt").write_text("not of this folder")
    assert not prepare.is_ready(prepared)
    assert prepared_here(config).about == about
    assert not (prepared.path / "stray.txt").exists()


@pytest.mark.parametrize("processes", [1, 2, 16])
@pytest.mark.parametrize("count", [1, 3, 5, 64, 245, 1000])
def test_tasks_hold_each_shard_once_and_end_small(count, processes):
    divided = tasks.divide(count, processes)
    assert [shard for task in divided for shard in range(task["first"], task["end"])] == list(range(count))
    sizes = [task["end"] - task["first"] for task in divided]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 and sizes[0] <= 16
    assert len(divided) >= min(count, 2 * processes)
