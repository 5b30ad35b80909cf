import json

import pytest

from manta import manifest


@pytest.fixture
def closed(tmp_path):
    folder = tmp_path / "closed"
    (folder / "part").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "part" / "rows.jsonl").write_text("{}\n")
    (folder / "empty").touch()
    manifest.close(folder, manifest.digests(folder), {"step": 3, "metrics": {"eval_loss": 0.5}})
    return folder


def test_a_closed_folder_is_whole_and_tells_what_it_is(closed):
    assert manifest.damage(closed) is None
    about = manifest.read(closed)
    assert (about["step"], about["metrics"]) == (3, {"eval_loss": 0.5})
    assert set(about["files"]) == {"weights.bin", "part/rows.jsonl", "empty"}
    assert about["files"]["weights.bin"]["size"] == 2048


def test_a_digest_is_the_sha256_of_the_content(tmp_path):
    (tmp_path / "abc").write_text("abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.digests(tmp_path) == {"abc": {"size": 3, "sha256": known}}


def test_a_file_longer_than_one_chunk_is_hashed_to_its_end(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(b"a" * ((1 << 20) + 1))
    one = manifest.sha256(path)
    path.write_bytes(b"a" * (1 << 20) + b"b")
    assert manifest.sha256(path) != one


def test_only_the_named_files_are_digested(closed):
    assert set(manifest.digests(closed, ["empty"])) == {"empty"}


def test_a_missing_file_is_damage(closed):
    (closed / "part" / "rows.jsonl").unlink()
    assert manifest.damage(closed) == "part/rows.jsonl is missing"


def test_a_folder_in_place_of_a_file_is_damage(closed):
    (closed / "empty").unlink()
    (closed / "empty").mkdir()
    assert manifest.damage(closed) == "empty is missing"


@pytest.mark.parametrize("content", [True, False])
def test_a_truncated_file_is_damage_even_without_hashing(closed, content):
    (closed / "weights.bin").write_bytes(bytes(2047))
    assert manifest.damage(closed, content) == "weights.bin has 2047 bytes instead of 2048"


def test_a_flipped_bit_is_damage(closed):
    data = bytearray((closed / "weights.bin").read_bytes())
    data[1000] ^= 1
    (closed / "weights.bin").write_bytes(data)
    assert manifest.damage(closed) == "weights.bin does not match its SHA-256"
    assert manifest.damage(closed, content=False) is None


def test_an_unfinished_folder_is_damage(tmp_path):
    (tmp_path / "weights.bin").touch()
    assert manifest.read(tmp_path) is None
    assert manifest.damage(tmp_path) == "it has no readable manifest"
    assert manifest.damage(tmp_path / "nowhere") == "it has no readable manifest"


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "files"', b"[1]", b"\xff\xfe", b'{"format": 2, "files": {}}'])
def test_an_unreadable_manifest_is_damage(closed, content):
    (closed / manifest.NAME).write_bytes(content)
    assert manifest.read(closed) is None
    assert manifest.damage(closed) == "it has no readable manifest"


def test_a_manifest_cut_anywhere_is_unreadable(closed):
    whole = (closed / manifest.NAME).read_bytes()
    for end in range(0, len(whole) - 2, 7):
        (closed / manifest.NAME).write_bytes(whole[:end])
        assert manifest.read(closed) is None


def test_writing_replaces_the_text_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "note.json"
    manifest.write_json(path, {"a": "é"})
    manifest.write_json(path, {"a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_text(tmp_path):
    path = tmp_path / "note.json"
    manifest.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        manifest.write_text(path, "new" * 10000 + "\ud800")
    assert path.read_text() == "old"


def test_a_reader_of_the_old_text_reads_it_to_the_end(tmp_path):
    """The file is replaced, never rewritten in place."""
    path = tmp_path / "note"
    manifest.write_text(path, "old text")
    with path.open() as reader:
        assert reader.read(3) == "old"
        manifest.write_text(path, "new")
        assert reader.read() == " text"
    assert path.read_text() == "new"
