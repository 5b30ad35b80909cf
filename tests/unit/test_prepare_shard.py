import json

import numpy as np
import pytest
from datasets import Dataset

from manta.config import Config
from manta.data import lines, prepare, shards, source
from manta.data.shards import TOKENIZED, Job
from manta.data.source import SPLITS
from manta.data.tokenize import IGNORE, load_tokenizer
from manta.errors import ConfigError, UserError
from tiny import EOS, tiny_tokenizer

TEMPLATES = {"input_template": "Question: {q}\n", "output_template": "{a}"}
ROWS = [{"q": f"What is {number} and {number}?", "a": f"The sum is {2 * number}."} for number in range(20)]
LONG = "the capital of France " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(folder)
    return str(folder)


@pytest.fixture
def staging(tmp_path):
    for name in ("done", "digests", *(f"tokenized/{split}" for split in TOKENIZED)):
        (tmp_path / "staging" / name).mkdir(parents=True)
    return tmp_path / "staging"


def config_of(model, data=None, **settings):
    return Config.from_dict({"hf_model_id": model, "hf_dataset_config": {**TEMPLATES, **(data or {})}, **settings})


def job_of(config, rows, staging, splits=None):
    """What writes shards of a file of these rows; all of them are training rows unless `splits` says otherwise."""
    path = staging.parent / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    data = config.hf_dataset_config.model_copy(update={"dataset_name": str(path)})
    sources = source.open_sources(data, staging.parent / "cache")
    splits = np.zeros(len(rows), dtype=np.int8) if splits is None else np.asarray(splits, dtype=np.int8)
    return Job(config.to_dict(), tuple(sources), ("template",), splits, staging)


def write(config, rows, staging, splits=None, shard=0):
    return shards.write_shard(job_of(config, rows, staging, splits), shard)


def texts(staging, split, shard=0):
    path = staging / f"{split}.jsonl.part-{shard:06d}"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def samples(staging, split="training", shard=0):
    return Dataset.from_file(str(staging / "tokenized" / split / f"part-{shard:06d}.arrow"))


def test_every_row_is_written_once_in_its_split(model, staging):
    splits = [number % 3 for number in range(len(ROWS))]
    result = write(config_of(model), ROWS, staging, splits)
    for index, split in enumerate(SPLITS):
        wanted = [number for number in range(len(ROWS)) if splits[number] == index]
        assert texts(staging, split) == [
            {"input": f"Question: {ROWS[number]['q']}\n", "output": ROWS[number]["a"], "row": number}
            for number in wanted
        ]
        assert result["counts"][f"{split}_rows"] == len(wanted)
        if split in TOKENIZED:
            assert samples(staging, split)["row"] == wanted
    assert result["rows"] == len(ROWS)
    assert result["first"] == {}
    assert not (staging / "tokenized" / "test").exists()


def test_the_tokens_say_what_the_text_says(model, staging):
    result = write(config_of(model), ROWS, staging)
    tokenizer = load_tokenizer(model)
    trained = 0
    for sample, text in zip(samples(staging), texts(staging, "training"), strict=True):
        labels = [label for label in sample["labels"] if label != IGNORE]
        assert tokenizer.decode(sample["input_ids"]) == text["input"] + text["output"] + EOS
        assert tokenizer.decode(labels) == text["output"] + EOS
        trained += len(labels)
    assert result["counts"]["training_trained_tokens"] == trained
    assert result["counts"]["training_tokens"] == sum(len(ids) for ids in samples(staging)["input_ids"])


def test_text_survives_as_it_is(model, staging):
    rows = [{"q": 'ü\u2028"\\', "a": "line\nline\t🙂"}]
    write(config_of(model), rows, staging)
    assert texts(staging, "training") == [{"input": 'Question: ü\u2028"\\\n', "output": "line\nline\t🙂", "row": 0}]


def test_a_prompt_over_the_limit_trains_nothing_and_is_counted(model, staging):
    """In the guide every label of such a row is masked, and its loss is NaN."""
    rows = [*ROWS[:3], {"q": LONG, "a": "Paris."}, *ROWS[3:6]]
    result = write(config_of(model, max_seq_length=60), rows, staging)
    assert result["counts"]["no_trained_token"] == 1
    assert result["first"] == {"no_trained_token": [3]}
    assert samples(staging)["row"] == [0, 1, 2, 4, 5, 6]
    assert result["counts"]["training_samples"] == 6
    assert all(any(label != IGNORE for label in labels[1:]) for labels in samples(staging)["labels"])


def test_an_overlong_output_is_cut_and_counted(model, staging):
    result = write(config_of(model, max_seq_length=60), [*ROWS[:2], {"q": "Where?", "a": LONG}], staging)
    assert result["first"] == {"truncated": [2]}
    assert len(samples(staging)[2]["input_ids"]) == 60


def test_an_overlong_row_can_be_left_out_and_is_counted(model, staging):
    rows = [{"q": LONG, "a": "Paris."}, ROWS[0], {"q": "Where?", "a": LONG}]
    result = write(config_of(model, max_seq_length=60, overlong_policy="drop"), rows, staging)
    assert result["first"] == {"overlong_dropped": [0, 2]}
    assert samples(staging)["row"] == [1]


def test_an_overlong_row_can_be_an_error(model, staging):
    with pytest.raises(UserError, match="over max_seq_length 60"):
        write(config_of(model, max_seq_length=60, overlong_policy="error"), [{"q": LONG, "a": "x"}], staging)


def test_a_row_without_output_is_left_out_and_counted(model, staging):
    rows = [ROWS[0], {"q": "x", "a": ""}, {"q": "x", "a": None}, {"q": "x", "a": " \n"}]
    result = write(config_of(model), rows, staging)
    assert result["first"] == {"empty_output": [1, 2, 3]}
    assert result["counts"]["training_rows"] == len(texts(staging, "training")) == 1


def test_a_merged_boundary_is_counted_and_kept(model, staging):
    rows = [ROWS[0], {"q": "Where?", "a": "\nParis."}]
    result = write(config_of(model), rows, staging)
    assert result["first"] == {"boundary_split": [1]}
    assert samples(staging)["row"] == [0, 1]


def test_a_blank_line_is_counted_and_keeps_its_number(model, staging):
    result = write(config_of(model), [ROWS[0], "", ROWS[1], "  "], staging)
    assert result["first"] == {"blank_line": [1, 3]}
    assert (result["rows"], result["bad"]) == (4, 0)
    assert samples(staging)["row"] == [0, 2]


def test_a_row_that_cannot_be_used_is_put_aside_with_its_reason(model, staging):
    result = write(config_of(model), [ROWS[0], "[1]", ROWS[1], '{"q": '], staging)
    (part,) = staging.glob("quarantine.jsonl.part-*")
    put_aside = [json.loads(line) for line in part.read_text().splitlines()]
    assert [(bad["row"], bad["where"].rpartition(", ")[2]) for bad in put_aside] == [(1, "line 2"), (3, "line 4")]
    assert "object is expected" in put_aside[0]["reason"] and "not JSON" in put_aside[1]["reason"]
    assert result["first_bad"] == put_aside
    assert (result["rows"], result["bad"]) == (4, 2)
    assert samples(staging)["row"] == [0, 2]


def test_only_the_first_examples_are_listed_and_all_are_counted(model, staging):
    result = write(config_of(model), [{"q": "x", "a": ""}] * 25, staging)
    assert result["counts"]["empty_output"] == 25
    assert result["first"]["empty_output"] == list(range(10))


def test_a_shard_in_which_nothing_trains_is_an_empty_part(model, staging):
    result = write(config_of(model, max_seq_length=20), [{"q": LONG, "a": "Paris."}], staging)
    assert len(samples(staging)) == result["counts"]["training_samples"] == 0


def test_continual_pretraining_trains_every_token_of_a_long_text(model, staging):
    config = config_of(model, {"output_template": "{a}"}, objective="cpt", max_seq_length=16)
    result = write(config, [{"q": "not seen", "a": LONG}], staging)
    tokenizer = load_tokenizer(model)
    pieces = samples(staging)
    assert pieces["labels"] == pieces["input_ids"]
    assert pieces["row"] == [0] * len(pieces)
    assert max(len(ids) for ids in pieces["input_ids"]) == 16
    joined = tokenizer.decode([token for ids in pieces["input_ids"] for token in ids])
    assert joined in (LONG + EOS, LONG)  # a last piece of one token has nothing before it, and is left out
    assert result["first"] == {}


def test_a_template_with_a_field_in_the_text_is_not_filled_twice(model, staging):
    write(config_of(model), [{"q": "{a}", "a": "{q}"}], staging)
    assert texts(staging, "training") == [{"input": "Question: {a}\n", "output": "{q}", "row": 0}]


def test_shards_divide_the_rows_and_number_them_as_the_source(model, staging):
    rows = [{"q": str(number), "a": "x"} for number in range(lines.SHARD_ROWS + 3)]
    job = job_of(config_of(model), rows, staging)
    assert (job.shards, job.rows) == (2, len(rows))
    first, last = (shards.write_shard(job, shard) for shard in (0, 1))
    assert (first["rows"], last["rows"]) == (lines.SHARD_ROWS, 3)
    assert samples(staging, shard=0)["row"] == list(range(lines.SHARD_ROWS))
    assert samples(staging, shard=1)["row"] == [lines.SHARD_ROWS + number for number in range(3)]
    assert [line["row"] for line in texts(staging, "training", shard=1)] == samples(staging, shard=1)["row"]


def test_the_same_shard_is_the_same_bytes(model, staging, tmp_path):
    splits = [number % 3 for number in range(len(ROWS))]
    results, written = [], []
    for _ in range(2):
        (staging / "done" / "000000.json").unlink(missing_ok=True)
        results.append(write(config_of(model), ROWS, staging, splits))
        written.append({path.name: path.read_bytes() for path in staging.rglob("*") if path.is_file()})
    assert results[0] == results[1]
    assert written[0] == written[1]


def test_a_shard_that_is_done_is_not_done_again(model, staging):
    job = job_of(config_of(model), ROWS, staging)
    result = shards.write_shard(job, 0)
    (staging.parent / "rows.jsonl").unlink()
    assert shards.write_shard(job, 0) == result


@pytest.mark.parametrize("part", ["training.jsonl.part-000000", "tokenized/training/part-000000.arrow"])
def test_a_shard_whose_part_is_damaged_is_done_again(model, staging, part):
    job = job_of(config_of(model), ROWS, staging)
    result = shards.write_shard(job, 0)
    whole = (staging / part).read_bytes()
    (staging / part).write_bytes(whole[:-7])
    assert shards.write_shard(job, 0) == result
    assert (staging / part).read_bytes() == whole
    (staging / part).unlink()
    assert shards.write_shard(job, 0) == result
    assert (staging / part).read_bytes() == whole


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"dataset_name": str(path)}


def test_the_folder_follows_everything_that_shapes_the_data(model, data, tmp_path):
    """The guide's cache ignores templates, mapping, split and seed, and so reuses stale data."""
    other = tmp_path / "other"
    tiny_tokenizer(other, vocab_size=300)
    written = tmp_path / "chat.jinja"
    written.write_text("{{ messages }}")
    configs = [
        config_of(model, data),
        config_of(str(other), data),
        config_of(model, data, seed=1),
        config_of(model, data, max_seq_length=512),
        config_of(model, data, overlong_policy="drop"),
        config_of(model, data, objective="cpt"),
        config_of(model, {**data, "input_template": "{q}"}),
        config_of(model, {**data, "output_template": "{a}."}),
        config_of(model, {**data, "field_mapping": {"a": "q"}}),
        config_of(model, {**data, "split": "test"}),
        config_of(model, {**data, "train_split_ratio": 0.8}),
        config_of(model, {**data, "val_test_split_ratio": 0.4}),
        config_of(model, {**data, "format": "text"}),
        config_of(model, {**data, "chat": True}),
        config_of(model, {**data, "train_on": "last"}),
        config_of(model, {**data, "weight": 2}),
        config_of(model, {"mixture": [data, data]}),
        config_of(model, data, packing=True),
        config_of(model, data, chat_template="qwen3"),
        config_of(model, data, chat_template=str(written)),
        config_of(model, data, chat_template_kwargs={"enable_thinking": False}),
    ]
    paths = [prepare.locate(config)[0].path for config in configs]
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    paths.append(prepare.locate(configs[0])[0].path)
    written.write_text("{{ messages[0] }}")
    paths.append(prepare.locate(configs[-2])[0].path)
    assert len(set(paths)) == len(paths)


def test_the_folder_does_not_follow_what_shapes_nothing(model, data):
    one, _ = prepare.locate(config_of(model, data))
    other, _ = prepare.locate(config_of(model, {**data, "num_proc": 1}, num_workers=3, learning_rate=1e-3, max_steps=5))
    allowed, _ = prepare.locate(config_of(model, data, bad_rows_limit=1.0, lint={"duplicates": "off"}))
    assert one == allowed
    assert one == other


def test_a_folder_that_was_never_prepared_is_not_ready(model, data, tmp_path):
    prepared, _ = prepare.locate(config_of(model, data, data_dir=str(tmp_path / "prepared")))
    assert not prepare.is_ready(prepared)
    with pytest.raises(UserError, match="is not prepared data"):
        _ = prepared.counts


def test_a_mistyped_template_is_refused_before_anything_is_made(model, data, tmp_path):
    config = config_of(model, {**data, "input_template": "{qq}"}, data_dir=str(tmp_path / "prepared"))
    prepared, _ = prepare.locate(config)
    with pytest.raises(ConfigError, match=r"Did you mean q\?"):
        prepare.open_job(config, prepared)
    assert list((tmp_path / "prepared").glob("*")) == []
    assert list((tmp_path / "prepared").glob(".*")) == []


def test_an_empty_validation_split_is_refused_before_anything_is_made(model, data, tmp_path):
    config = config_of(model, {**data, "train_split_ratio": 0.999}, data_dir=str(tmp_path / "prepared"))
    prepared, _ = prepare.locate(config)
    with pytest.raises(UserError, match="leave the validation split empty"):
        prepare.open_job(config, prepared)


def test_the_source_opens_as_the_rows_of_the_file(model, data, tmp_path):
    config = config_of(model, data, data_dir=str(tmp_path / "prepared"))
    job = prepare.open_job(config, prepare.locate(config)[0])
    assert list(job.sources[0]) == ROWS
    assert job.formats == ("template",)
    assert job.splits.tolist().count(0) == 18
    assert not (tmp_path / "prepared").exists()
