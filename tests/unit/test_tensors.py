"""Safetensors files as streams, against the library that defines them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manta import tensors
from manta.errors import UserError


def some() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(3, 700_000, generator=draw),
        "long": torch.randn(70_000, 33, generator=draw).to(torch.bfloat16),
        "cube": torch.randn(5, 4, 3, generator=draw).half(),
        "vector": torch.randn(7, generator=draw),
        "scalar": torch.tensor(2.5),
        "whole numbers": torch.arange(9, dtype=torch.int64),
        "bytes": torch.arange(11, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
    }


def test_what_is_read_is_what_the_library_wrote(tmp_path):
    save_file(some(), tmp_path / "model.safetensors")
    read = tensors.read(tmp_path)
    assert {name: each.shape for name, each in read.items()} == {name: tuple(t.shape) for name, t in some().items()}
    for name, tensor in some().items():
        if tensor.is_floating_point():
            rows = tensor.shape[0] if tensor.shape else 1
            assert torch.equal(read[name].rows(0, rows), tensor)
    assert torch.equal(read["long"].rows(17, 19), some()["long"][17:19])


@pytest.mark.parametrize("size", ["50GB", "1MB"])
def test_what_is_written_the_library_reads(tmp_path, size):
    save_file(some(), tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    tensors.write(tmp_path / "out", {n: tensors.as_is(each) for n, each in tensors.read(tmp_path).items()}, size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (size == "50GB")
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert written.keys() == some().keys()
    for name, tensor in some().items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(some()) and index["metadata"]["total_size"] > 1 << 20
        assert tensors.read(tmp_path / "out").keys() == some().keys()


def test_a_tensor_in_pieces_of_several_ranks_is_read_whole(tmp_path):
    whole = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    for number, (rows, columns) in enumerate([((0, 4), (0, 6)), ((4, 10), (0, 2)), ((4, 10), (2, 6))], 1):
        info = {"x": {"saved_offsets": [rows[0], columns[0]]}}
        part = {"x": whole[rows[0] : rows[1], columns[0] : columns[1]].contiguous()}
        name = f"shard-{number:05d}-model-00001-of-00001.safetensors"
        save_file(part, tmp_path / name, {"DCP_SHARDING_INFO": json.dumps(info)})
    read = tensors.read(tmp_path)["x"]
    assert read.shape == (10, 6)
    for first, last in [(0, 10), (0, 2), (3, 5), (7, 10)]:
        assert torch.equal(read.rows(first, last), whole[first:last])
    (tmp_path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UserError, match="does not hold all of x"):
        tensors.read(tmp_path)


def test_files_beside_the_index_are_not_the_model(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )
    read = tensors.read(tmp_path)
    assert list(read) == ["a"] and torch.equal(read["a"].rows(0, 2), torch.ones(2))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="no weights"):
        tensors.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"only \*\.bin"):
        tensors.read(tmp_path)
    save_file(some(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    for cut in (4, 100, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            tensors.read(tmp_path)
    with pytest.raises(UserError, match="max_shard_size"):
        tensors.write(tmp_path, {"x": tensors.of_rows("F32", (1,), lambda first, last: torch.ones(1))}, "big")
