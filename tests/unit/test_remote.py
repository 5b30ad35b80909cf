"""Data behind a URL: a web server of the test's own, and fsspec's file system in memory."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from manta.config import Config
from manta.data import prepare
from manta.data.prepare import Prepared
from manta.errors import UserError
from tiny import tiny_tokenizer

ROWS = [{"q": f"What is {number} and {number}?", "a": f"The sum is {2 * number}."} for number in range(40)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(folder)
    return str(folder)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def url(served: Path) -> Iterator[str]:
    """Where the folder `served` can be fetched."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(model: str, name: str, folder: Path, data: dict[str, Any] | None = None, **settings: Any) -> Config:
    data = {"dataset_name": name, "input_template": "Question: {q}\n", "output_template": "{a}", **(data or {})}
    return Config.from_dict(
        {"hf_model_id": model, "data_dir": str(folder / "prepared"), "hf_dataset_config": data, **settings}
    )


def prepared_here(config: Config) -> Prepared:
    prepared, parts = prepare.locate(config)
    prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
    assert prepare.is_ready(prepared)
    return prepared


def outputs(prepared: Prepared) -> set[str]:
    splits = ("training", "validation", "test")
    return {json.loads(line)["output"] for split in splits for line in prepared.text(split).read_text().splitlines()}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def test_a_file_behind_a_url_is_prepared_as_the_file_itself(model, served, url, tmp_path):
    path = write(served / "rows.jsonl", ROWS)
    remote = prepared_here(config_of(model, f"{url}/rows.jsonl", tmp_path / "remote"))
    local = prepared_here(config_of(model, str(path), tmp_path / "local"))
    assert remote.about["files"] == local.about["files"]
    assert left_in(remote.path.parent) == [remote.path.name]  # no download, lock or staging folder


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.jsonl.gz", "rows.parquet"])
def test_other_formats_are_fetched_too(model, served, url, tmp_path, name):
    from datasets import Dataset

    table, path = Dataset.from_list(ROWS), served / name
    if name == "rows.json":
        path.write_text(json.dumps(ROWS))
    elif name == "rows.csv":
        table.to_csv(str(path))
    elif name == "rows.parquet":
        table.to_parquet(str(path))
    else:
        import gzip

        path.write_bytes(gzip.compress(write(served / "plain.jsonl", ROWS).read_bytes()))
    prepared = prepared_here(config_of(model, f"{url}/{name}", tmp_path))
    assert outputs(prepared) == {row["a"] for row in ROWS}
    assert left_in(prepared.path.parent) == [prepared.path.name]


def test_another_file_behind_the_same_url_is_prepared_anew(model, served, url, tmp_path):
    config = config_of(model, f"{url}/rows.jsonl", tmp_path)
    write(served / "rows.jsonl", ROWS)
    before = prepared_here(config)
    assert prepare.locate(config)[0] == before
    write(served / "rows.jsonl", [*ROWS, {"q": "Another?", "a": "Yes, another."}])
    after = prepared_here(config)
    assert after != before
    assert "Yes, another." in outputs(after)


def test_bad_rows_are_named_by_their_url(model, served, url, tmp_path):
    path = write(served / "rows.jsonl", ROWS)
    with path.open("a") as file:
        file.write("{broken\n")
    prepared = prepared_here(config_of(model, f"{url}/rows.jsonl", tmp_path, bad_rows_limit=0.1))
    bad = [json.loads(line) for line in (prepared.path / prepare.QUARANTINE).read_text().splitlines()]
    assert [each["where"] for each in bad] == [f"{url}/rows.jsonl, line 41"]


@pytest.mark.parametrize("name", ["missing.jsonl", "empty/"])
def test_what_is_not_there_is_one_error_and_leaves_nothing(model, served, url, tmp_path, name):
    (served / "empty").mkdir()
    with pytest.raises(UserError, match=rf"nothing to read at {url}/{name}"):
        prepare.locate(config_of(model, f"{url}/{name}", tmp_path))
    assert not (tmp_path / "prepared").exists()


def test_a_file_that_goes_away_is_one_error_and_leaves_nothing(model, served, url, tmp_path):
    config = config_of(model, f"{url}/rows.jsonl", tmp_path)
    write(served / "rows.jsonl", ROWS)
    prepared, _ = prepare.locate(config)
    (served / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        prepare.open_job(config, prepared)
    assert left_in(tmp_path / "prepared") == []


def test_a_server_that_does_not_answer_is_one_error(model, tmp_path):
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/rows.jsonl. Check --hfdc_dataset_name"):
        prepare.locate(config_of(model, "http://127.0.0.1:9/rows.jsonl", tmp_path))


def test_a_folder_in_storage_is_all_of_its_data_files(model, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True)
    for number in range(4):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS[number::4])
        memory.pipe(f"/rows/part-{number}.jsonl", lines.encode())
    memory.pipe("/rows/README.md", b"not data")
    config = config_of(model, "memory://rows", tmp_path)
    before = prepared_here(config)
    assert outputs(before) == {row["a"] for row in ROWS}
    assert prepare.locate(config)[0] == before
    memory.pipe("/rows/part-4.jsonl", json.dumps({"q": "More?", "a": "More."}).encode())
    assert outputs(prepared_here(config)) == {*(row["a"] for row in ROWS), "More."}
    memory.pipe("/rows/part-4.jsonl", json.dumps({"q": "More?", "a": "Else."}).encode())
    assert "Else." in outputs(prepared_here(config))


def test_the_split_of_a_folder_in_storage_is_told_by_names_as_here(model, tmp_path):
    """Else rows that are held back for a test would be trained on."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True)
    for name in ("train/rows.jsonl", "test/rows.jsonl"):
        memory.pipe(f"/my-test-data/{name}", json.dumps({"q": "Which?", "a": f"Of {name}."}).encode() + b"\n")
    for split in ("train", "test"):
        data = {"split": split, "train_split_ratio": 1.0}
        assert outputs(prepared_here(config_of(model, "memory://my-test-data", tmp_path, data))) == {
            f"Of {split}/rows.jsonl."
        }


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_storage_without_its_package_says_what_to_install(model, tmp_path, scheme, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed: {scheme}:// would be asked")
    with pytest.raises(UserError, match=rf"^{scheme}://bucket/rows.jsonl needs .*{package}"):
        prepare.locate(config_of(model, f"{scheme}://bucket/rows.jsonl", tmp_path))
