import gzip
import json
from datetime import date

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manta import manifest
from manta.data import formats, source
from manta.data.lines import SHARD_ROWS, BadRow
from manta.data.source import SPLITS
from manta.dataset_config import HFDatasetConfig
from manta.errors import ConfigError, UserError

ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Grüße 🙂", "input": "", "output": 'a "b",\nc'},
    {"instruction": "Last.", "input": "x", "output": "y"},
]


def write_json(path):
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def write_jsonl(path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def write_csv(path):
    Dataset.from_list(ROWS).to_csv(path)


def write_parquet(path):
    Dataset.from_list(ROWS).to_parquet(path)


def write_folder(path):
    path.mkdir()
    write_jsonl(path / "rows.jsonl")


def write_saved(path):
    Dataset.from_list(ROWS).save_to_disk(path)


def write_saved_splits(path):
    other = Dataset.from_list(ROWS[:1])
    DatasetDict({"train": Dataset.from_list(ROWS), "held_out": other}).save_to_disk(path)


KINDS = {
    "rows.json": write_json,
    "rows.jsonl": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "folder": write_folder,
    "saved": write_saved,
    "saved_splits": write_saved_splits,
}


@pytest.fixture
def opened(tmp_path):
    """Open what is at a path, with a cache of its own."""

    def open_path(path, **settings):
        return source.open_source(HFDatasetConfig(dataset_name=str(path), **settings), tmp_path / "cache")

    return open_path


@pytest.fixture
def having(tmp_path, opened):
    """Open a file whose rows have these columns."""

    def open_columns(columns, **settings):
        (tmp_path / "rows.jsonl").write_text(json.dumps(dict.fromkeys(columns, "x")) + "\n")
        return opened(tmp_path / "rows.jsonl", **settings)

    return open_columns


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_every_kind_of_source_are_read(tmp_path, opened, name):
    KINDS[name](tmp_path / name)
    found = opened(tmp_path / name)
    assert list(found) == ROWS
    assert found.columns == ("instruction", "input", "output")
    assert len(found) == len(ROWS)


def test_the_named_split_of_a_saved_dataset_is_read(tmp_path, opened):
    write_saved_splits(tmp_path / "saved")
    assert len(opened(tmp_path / "saved", split="held_out")) == 1
    with pytest.raises(UserError, match=r"no split 'test'. Give --hfdc_split one of \['train', 'held_out'\]"):
        opened(tmp_path / "saved", split="test")


def test_the_named_split_of_a_folder_is_read(tmp_path, opened):
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl")
    (tmp_path / "folder" / "test.jsonl").write_text('{"output": "only"}\n')
    assert list(opened(tmp_path / "folder", split="test")) == [{"output": "only"}]
    with pytest.raises(UserError, match="Unknown split"):
        opened(tmp_path / "folder", split="dev")


@pytest.mark.parametrize("name", ["rows [1].jsonl", "a*b.jsonl", "größe.jsonl"])
def test_a_file_is_read_whatever_its_name(tmp_path, opened, name):
    write_jsonl(tmp_path / name)
    assert len(opened(tmp_path / name)) == len(ROWS)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere/", "a/b/c"])
def test_a_missing_file_is_named(tmp_path, opened, name):
    path = f"{tmp_path}/{name}"
    with pytest.raises(UserError, match=r"There is no file or folder .*--hfdc_dataset_name"):
        opened(path)
    with pytest.raises(UserError, match="There is no file or folder"):
        source.identity(HFDatasetConfig(dataset_name=path))


def test_a_file_of_another_kind_is_refused(tmp_path, opened):
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(ConfigError, match=r"rows.xlsx: a data file must end in .json, .jsonl, .csv, .parquet"):
        opened(tmp_path / "rows.xlsx")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", ""),
        ("rows.json", "[]"),
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n\n"),
        ("rows.csv", ""),
        ("rows.csv", "instruction,output\n"),
    ],
)
def test_an_empty_file_is_a_message(tmp_path, opened, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} holds no rows"):
        opened(tmp_path / name)


def test_an_empty_folder_is_a_message(tmp_path, opened):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder cannot be read: .*doesn't contain any data files"):
        opened(tmp_path / "folder")


def test_a_saved_dataset_without_rows_is_a_message(tmp_path, opened):
    Dataset.from_dict({"output": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved (holds no rows|cannot be read)"):
        opened(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", b'[{"a": 1}, {"a": ]'),
        ("rows.jsonl", b'{"a": \n'),
        ("rows.jsonl", b"\xff\xfe\x00\x01"),
        ("rows.csv", b'a,b\n"1,2\n3'),
        ("rows.csv", "a\né\n".encode("latin-1")),
        ("rows.parquet", b"PAR1 and nothing more"),
        ("rows.parquet", b""),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, opened, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} cannot be read(: \S| as a JSON array: after 1 element, \S)"):
        opened(tmp_path / name)


def test_a_broken_row_costs_that_row_and_is_found_again(tmp_path, opened):
    (tmp_path / "rows.jsonl").write_text('{"a": "x"}\n{"a": \n\n{"a": "y"}\n')
    rows = list(opened(tmp_path / "rows.jsonl"))
    assert [row for row in rows if not isinstance(row, BadRow)] == [{"a": "x"}, None, {"a": "y"}]
    assert str(rows[1]).startswith("not JSON")
    assert opened(tmp_path / "rows.jsonl").rows.where(3) == f"{tmp_path / 'rows.jsonl'}, line 4"


def test_a_row_is_found_again_in_the_file_of_a_folder_that_holds_it(tmp_path, opened):
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "a.jsonl")
    write_csv(tmp_path / "folder" / "b.csv")
    rows = opened(tmp_path / "folder").rows
    assert [rows.where(number).removeprefix(f"{tmp_path}/folder/") for number in (0, 2, 3, 5)] == [
        "a.jsonl, line 1",
        "a.jsonl, line 3",
        "b.csv, row 1",
        "b.csv, row 3",
    ]


def test_shards_divide_the_rows_of_all_files_in_order(tmp_path, opened):
    (tmp_path / "folder").mkdir()
    for name, first, count in (("a", 0, SHARD_ROWS + 3), ("b", SHARD_ROWS + 3, 5)):
        rows = [{"n": number} for number in range(first, first + count)]
        (tmp_path / "folder" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = opened(tmp_path / "folder")
    assert list(found.rows.shards) == [SHARD_ROWS, 3, 5]
    assert [row["n"] for row in found] == list(range(SHARD_ROWS + 8))


def test_an_array_is_read_whole_wherever_a_read_of_the_file_ends(tmp_path, opened):
    rows = [{"a": 'é\\"\n}', "b": -12.5e3}, 1234, {"c": {"d": [True, None]}}]
    rest = "  ,\n" + " , ".join(json.dumps(row) for row in rows) + "\n ]\n "
    for place in range(len(rest) + 1):
        filler = {"a": "x" * ((1 << 20) - place - len('[{"a": ""}'))}
        (tmp_path / "rows.json").write_text("[" + json.dumps(filler) + rest)
        first, *others = opened(tmp_path / "rows.json")
        assert first == filler
        assert [others[0], str(others[1]), others[2]] == [
            rows[0],
            "a number or a truth value where an object is expected",
            rows[2],
        ]


def test_elements_larger_than_one_read_of_the_file_are_read_whole(tmp_path, opened):
    rows = [{"a": letter * size} for letter, size in (("é", 3 << 20), ("x", 1 << 20), ("🙂", 1 << 20), ("y", 1))]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert list(opened(tmp_path / "rows.json")) == rows


def test_compressed_files_are_read_as_what_they_hold(tmp_path, opened):
    for name in ("rows.json", "rows.jsonl", "rows.csv"):
        KINDS[name](tmp_path / name)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert list(opened(tmp_path / f"{name}.gz")) == ROWS


def test_a_file_behind_a_url_is_read_as_one_here(tmp_path, opened):
    write_csv(tmp_path / "rows.csv")
    url = (tmp_path / "rows.csv").as_uri()
    assert list(opened(url)) == ROWS
    before = source.identity(HFDatasetConfig(dataset_name=url))
    assert source.identity(HFDatasetConfig(dataset_name=url)) == before
    (tmp_path / "rows.csv").write_text("output\nother\n")
    assert source.identity(HFDatasetConfig(dataset_name=url)) != before


@pytest.mark.parametrize("url", ["file:///nowhere/rows.jsonl", "nosuch://bucket/rows.jsonl"])
def test_a_url_that_leads_nowhere_is_a_message(opened, url):
    for attempt in (opened, lambda url: source.identity(HFDatasetConfig(dataset_name=url))):
        with pytest.raises(UserError, match=rf"{url}.*--hfdc_dataset_name"):
            attempt(url)


def test_the_datasets_of_a_mixture_are_numbered_one_after_the_other(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    write_csv(tmp_path / "b.csv")
    names = [{"dataset_name": str(tmp_path / name)} for name in ("a.jsonl", "b.csv", "a.jsonl")]
    sources = source.open_sources(HFDatasetConfig(mixture=names), tmp_path / "cache")
    assert [(each.first_row, each.first_shard) for each in sources] == [(0, 0), (3, 1), (6, 2)]
    assert [list(each) for each in sources] == [ROWS] * 3


def test_columns_are_those_of_the_first_rows_together(tmp_path, opened):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnot a row\n{"b": 2, "a": 1}\n')
    found = opened(tmp_path / "rows.jsonl")
    assert found.columns == ("a", "b")
    assert found.examples == ({"a": 1}, {"b": 2, "a": 1})


def test_nulls_that_parquet_puts_into_nested_values_are_gone(tmp_path, opened):
    rows = [{"calls": [{"x": 1}]}, {"calls": [{"y": 2}]}, {"calls": None}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert list(opened(tmp_path / "rows.parquet")) == rows


@pytest.mark.parametrize("text", ["007", "1.10", "None", "NA", "null", "nan", "true", "2024-05-01", " x "])
def test_text_of_a_csv_stays_as_it_is_written(tmp_path, opened, text):
    """A reader that guesses types makes 7 of 007, and no output at all of the answer None."""
    for path in (tmp_path / "rows.csv", tmp_path / "folder" / "rows.csv"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"instruction,output\nq,{text}\n")
    for path in (tmp_path / "rows.csv", tmp_path / "folder"):
        assert list(opened(path)) == [{"instruction": "q", "output": text}]


def test_an_empty_cell_of_a_csv_is_empty_text(tmp_path, opened):
    (tmp_path / "rows.csv").write_text("n,output\n1,x\n,y\n")
    data = HFDatasetConfig(input_template="{n}")
    assert [formats.render(data, row, "sft") for row in opened(tmp_path / "rows.csv")] == [("1", "x"), ("", "y")]


@pytest.mark.parametrize("text", ["2024-05-01", "2024-05-01 10:00:00", "2024-05-01T10:00:00Z", "12:30:00", "007"])
def test_text_that_looks_like_a_date_stays_as_it_is_written(tmp_path, opened, text):
    data = HFDatasetConfig(input_template="{nested}")
    rows = [{"output": text, "nested": [text]}, {"output": text, "nested": []}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        found = list(opened(tmp_path / name))
        assert found == rows
        assert formats.render(data, found[0], "sft") == (json.dumps([text]), text)


def test_nothing_and_nested_values_become_text(tmp_path, opened):
    rows = [
        {"none": None, "list": [1, 2], "dict": {"ä": "x", "y": None}, "number": 1.5, "yes": True},
        {"none": "some", "list": [], "dict": {"ä": "z", "y": 3}, "number": 2.0, "yes": False},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = HFDatasetConfig(input_template="{none}|{list}|{dict}", output_template="{number} {yes}")
    first, second = (formats.render(data, row, "sft") for row in opened(tmp_path / "rows.jsonl"))
    assert first == ('|[1, 2]|{"ä": "x", "y": null}', "1.5 True")
    assert second == ('some|[]|{"ä": "z", "y": 3}', "2.0 False")


def test_dates_inside_nested_values_become_text():
    data = HFDatasetConfig(input_template="", output_template="{when}")
    assert formats.render(data, {"when": {"day": date(2024, 5, 1)}}, "sft")[1] == '{"day": "2024-05-01"}'


def test_templates_are_filled_and_values_are_not_templates():
    data = HFDatasetConfig(input_template="{{{q}}} {q}: ", output_template="{a}")
    row = {"q": "{a} {nothing}", "a": "%s {q} \\n"}
    assert formats.render(data, row, "sft") == ("{{a} {nothing}} {a} {nothing}: ", "%s {q} \\n")


def test_continual_pretraining_has_no_input():
    assert formats.render(HFDatasetConfig(), {"output": "text"}, "cpt") == ("", "text")


def test_a_mapped_field_takes_its_column(having):
    mapping = {"input": "context", "instruction": "question", "output": "answer"}
    data = HFDatasetConfig(field_mapping=mapping)
    row = {"question": "Q", "context": "C", "answer": "A", "input": "not this"}
    assert formats.render(data, row, "sft") == ("### Instruction:\nQ\n### Input:\nC\n### Response:\n", "A")
    formats.check_templates(having(row, field_mapping=mapping), "sft")


def test_a_template_of_a_missing_field_names_the_nearest_column(having):
    found = having(["question", "answer"], input_template="{qestion}", output_template="{answer}")
    with pytest.raises(ConfigError, match=r"input_template asks for \{qestion\}.*Did you mean question\?"):
        formats.check_templates(found, "sft")


def test_a_mapping_to_a_missing_column_names_the_nearest(having):
    found = having(["q", "answer"], input_template="{q}", output_template="{a}", field_mapping={"a": "answr"})
    with pytest.raises(ConfigError, match=r"output_template asks for \{a\}.*Did you mean answer\?"):
        formats.check_templates(found, "sft")


def test_a_field_like_no_column_points_to_the_mapping(having):
    found = having(["a", "b"], input_template="{zzz}", output_template="{a}")
    with pytest.raises(ConfigError, match=r"columns \['a', 'b'\].*--hfdc_field_mapping"):
        formats.check_templates(found, "sft")


def test_continual_pretraining_does_not_ask_for_the_inputs_fields(having):
    found = having(["text"], output_template="{text}")
    formats.check_templates(found, "cpt")
    with pytest.raises(ConfigError, match="instruction"):
        formats.check_templates(found, "sft")


def counts(splits):
    return {name: int((splits == index).sum()) for index, name in enumerate(SPLITS)}


@pytest.mark.parametrize(
    ("rows", "ratio", "test_share", "expected"),
    [
        (1000, 0.995, 0.4, (995, 3, 2)),
        (1000, 0.9, 0.5, (900, 50, 50)),
        (1000, 0.9, 0.0, (900, 100, 0)),
        (1000, 1.0, 0.5, (1000, 0, 0)),
        (2, 0.5, 0.5, (1, 1, 0)),
        (7, 0.29, 0.5, (2, 3, 2)),
    ],
)
def test_the_splits_have_exact_counts(rows, ratio, test_share, expected):
    data = HFDatasetConfig(train_split_ratio=ratio, val_test_split_ratio=test_share)
    splits = source.assign_splits(rows, data, seed=1)
    assert splits.shape == (rows,)
    assert tuple(counts(splits).values()) == expected


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 3000), ratio=st.floats(0.01, 1), share=st.floats(0, 1))
def test_no_count_is_off_by_more_than_one_row(rows, ratio, share):
    data = HFDatasetConfig(train_split_ratio=ratio, val_test_split_ratio=share)
    try:
        found = counts(source.assign_splits(rows, data, seed=1))
    except UserError:
        # Only where a split that is needed would have less than a row of its own.
        assert rows * ratio <= 1 or rows * (1 - ratio) * (1 - share) <= 1
        return
    assert abs(found["training"] - rows * ratio) <= 0.5
    assert abs(found["test"] - (rows - found["training"]) * share) <= 0.5
    assert sum(found.values()) == rows
    assert found["validation"] > 0 or ratio == 1


@given(rows=st.integers(20, 200), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_the_draw_is_seeded(rows, seed):
    data = HFDatasetConfig(train_split_ratio=0.5)
    first = source.assign_splits(rows, data, seed)
    assert np.array_equal(first, source.assign_splits(rows, data, seed))
    assume(rows > 60)
    assert not np.array_equal(first, source.assign_splits(rows, data, seed + 1))
    assert counts(first) == counts(source.assign_splits(rows, data, seed + 1))


def test_the_draw_is_not_the_order_of_the_file():
    splits = source.assign_splits(1000, HFDatasetConfig(), seed=1)
    assert (splits[:900] != 0).any()


@pytest.mark.parametrize(
    ("rows", "ratio", "test_share", "empty"),
    [
        (10, 0.99, 0.5, "validation"),
        (10, 0.9, 1.0, "validation"),
        (1, 0.9, 0.5, "validation"),
        (1, 0.1, 0.5, "training"),
    ],
)
def test_an_empty_split_that_is_needed_is_refused(rows, ratio, test_share, empty):
    data = HFDatasetConfig(train_split_ratio=ratio, val_test_split_ratio=test_share)
    with pytest.raises(UserError, match=f"leave the {empty} split empty. Change --hfdc_train_split_ratio"):
        source.assign_splits(rows, data, seed=1)


def test_the_whole_file_can_be_trained_on():
    assert counts(source.assign_splits(1, HFDatasetConfig(train_split_ratio=1.0), seed=1))["training"] == 1


@pytest.mark.parametrize("name", KINDS)
def test_one_changed_byte_makes_another_source(tmp_path, name):
    data = HFDatasetConfig(dataset_name=str(tmp_path / name))
    KINDS[name](tmp_path / name)
    before = source.identity(data)
    assert source.identity(data) == before
    path = tmp_path / name
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert source.identity(data) != before
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert source.identity(data) == before


def test_another_file_in_a_folder_makes_another_source(tmp_path):
    write_folder(tmp_path / "folder")
    data = HFDatasetConfig(dataset_name=str(tmp_path / "folder"))
    before = source.identity(data)
    write_jsonl(tmp_path / "folder" / "more.jsonl")
    assert source.identity(data) != before


def test_a_moved_file_is_the_same_source(tmp_path):
    paths = [tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"]
    for path in paths:
        path.parent.mkdir()
        write_jsonl(path)
    one, other = (source.identity(HFDatasetConfig(dataset_name=str(path))) for path in paths)
    assert one == other


def test_a_dataset_that_the_hub_does_not_give_is_a_message():
    data = HFDatasetConfig(dataset_name="manta-tests/no-such-dataset")
    says = r"neither a file or folder here nor a dataset the hub gives us: .* (reached|set).*--hfdc_dataset_name"
    with pytest.raises(UserError, match=says):
        source.identity(data)


def test_a_plain_name_means_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert source.local_path(HFDatasetConfig(dataset_name="owner/name")) is None
    write_folder(tmp_path / "rows")
    assert source.local_path(HFDatasetConfig(dataset_name="rows")) is not None


def test_the_fingerprint_follows_every_part_and_not_their_order():
    parts = {"data": {"a": "1", "b": "2"}, "seed": 1}
    assert manifest.fingerprint(parts) == manifest.fingerprint({"seed": 1, "data": {"b": "2", "a": "1"}})
    assert manifest.fingerprint(parts) != manifest.fingerprint({**parts, "seed": 2})
    assert len(manifest.fingerprint(parts)) == 16
