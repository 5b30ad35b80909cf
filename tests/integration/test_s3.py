"""Data in an S3 bucket, through the real client and over real HTTP; the server speaks S3 on this machine."""

from __future__ import annotations

import gzip
import json

import pytest

from manta.config import Config
from manta.data import prepare
from manta.errors import UserError
from s3 import s3_server
from tiny import tiny_tokenizer

ROWS = [{"instruction": f"Say {number}.", "output": f"{number}!"} for number in range(40)]


@pytest.fixture
def bucket():
    """A client with the empty bucket `corpus`."""
    import boto3

    with s3_server("corpus"):
        yield boto3.client("s3")


def config_of(folder, name):
    if not (folder / "base").exists():
        tiny_tokenizer(folder / "base")
    return Config.from_dict(
        {
            "hf_model_id": str(folder / "base"),
            "data_dir": str(folder / "prepared"),
            "hf_dataset_config": {"dataset_name": name},
        }
    )


def test_objects_of_a_bucket_are_prepared_and_told_apart(bucket, tmp_path):
    lines = [json.dumps(row) + "\n" for row in ROWS]
    bucket.put_object(Bucket="corpus", Key="set/a.jsonl.gz", Body=gzip.compress("".join(lines[:25]).encode()))
    bucket.put_object(Bucket="corpus", Key="set/b.jsonl", Body="".join(lines[25:]).encode())
    bucket.put_object(Bucket="corpus", Key="set/README.md", Body=b"not data")
    config = config_of(tmp_path, "s3://corpus/set")
    prepared, parts = prepare.locate(config)
    prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
    rows = [
        json.loads(line)
        for split in ("training", "validation", "test")
        for line in prepared.text(split).open(encoding="utf-8")
    ]
    assert {row["row"]: row["output"] for row in rows} == {i: row["output"] for i, row in enumerate(ROWS)}
    assert prepare.locate(config)[0] == prepared and prepare.is_ready(prepared)
    assert {path.name for path in prepared.path.parent.iterdir()} == {prepared.path.name}

    bucket.put_object(Bucket="corpus", Key="set/b.jsonl", Body="".join(lines[26:]).encode())
    assert prepare.locate(config)[0] != prepared


@pytest.mark.parametrize("name", ["s3://corpus/none.jsonl", "s3://corpus/empty"])
def test_what_is_not_in_the_bucket_is_a_message(bucket, tmp_path, name):
    with pytest.raises(UserError, match=f"{name}.*--hfdc_dataset_name"):
        prepare.locate(config_of(tmp_path, name))
    assert not (tmp_path / "prepared").exists()
