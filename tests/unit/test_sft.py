import json

import pytest

from manta import SFTDataset, load_and_prepare_datasets
from manta.data.tokenize import IGNORE
from manta.dataset_config import HFDatasetConfig
from manta.errors import ConfigError, UserError
from tiny import EOS, tiny_tokenizer

ROWS = [{"q": f"What is {number}?", "a": f"The sum is {number}."} for number in range(20)]
LONG = "the capital of France " * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return HFDatasetConfig(dataset_name=str(path), input_template="Question: {q}\n", output_template="{a}")


def changed(config, **settings):
    return HFDatasetConfig(**{**config.model_dump(), **settings})


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(dataset, tokenizer):
    """(prompt, answer) of every sample, by decoding its masked and its trained tokens."""
    pairs = []
    for sample in (dataset[index] for index in range(len(dataset))):
        masked = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == IGNORE]
        trained = [label for label in sample["labels"] if label != IGNORE]
        pairs.append((tokenizer.decode(masked), tokenizer.decode(trained)))
    return pairs


def test_the_input_is_masked_and_the_output_and_eos_are_trained(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [{"input": "Question:\n", "output": "The sum is 42."}])
    dataset = SFTDataset(path, tokenizer, 64)
    assert texts(dataset, tokenizer) == [("Question:\n", "The sum is 42." + EOS)]
    sample = dataset[0]
    assert sample["attention_mask"] == [1] * len(sample["input_ids"]) == [1] * len(sample["labels"])


def test_a_boundary_that_would_merge_is_masked_exactly(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [{"input": "of France?\n", "output": "\nParis."}])
    assert texts(SFTDataset(path, tokenizer, 64), tokenizer) == [("of France?\n", "\nParis." + EOS)]


def test_rows_whose_prompt_fills_the_limit_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [{"input": LONG, "output": "Paris."}, {"input": "Question:\n", "output": LONG}]
    dataset = SFTDataset(write_lines(tmp_path / "rows.jsonl", rows), tokenizer, 32)
    assert (len(dataset), dataset.dropped) == (1, 1)
    assert len(dataset[0]["input_ids"]) == 32
    assert any(label != IGNORE for label in dataset[0]["labels"])


def test_a_file_without_rows_is_an_empty_dataset(tmp_path, tokenizer):
    dataset = SFTDataset(write_lines(tmp_path / "rows.jsonl", []), tokenizer, 32)
    assert (len(dataset), dataset.dropped) == (0, 0)


def test_the_rows_are_divided_and_none_is_lost(config, tmp_path, tokenizer):
    root = tmp_path / "data"
    config = changed(config, train_split_ratio=0.6)
    training, validation = load_and_prepare_datasets(config, root, tokenizer, 64, rank=0)
    assert (len(training), len(validation)) == (12, 4)
    (folder,) = root.iterdir()
    test = SFTDataset(folder / "test.jsonl", tokenizer, 64)
    found = [pair for dataset in (training, validation, test) for pair in texts(dataset, tokenizer)]
    assert sorted(found) == sorted((f"Question: {row['q']}\n", row["a"] + EOS) for row in ROWS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_nothing_but_the_splits_and_their_manifest_is_left(config, tmp_path, tokenizer, name):
    (tmp_path / "rows.csv").write_text("q,a\n" + "What?,That.\n" * 20)
    config = changed(config, dataset_name=str(tmp_path / name))
    load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)
    (folder,) = (tmp_path / "data").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "training.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "manifest.json",
    }


def test_without_evaluation_the_validation_set_is_empty(config, tmp_path, tokenizer):
    config = changed(config, train_split_ratio=1.0)
    training, validation = load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)
    assert (len(training), len(validation)) == (20, 0)


def test_a_changed_setting_never_meets_old_files(config, tmp_path, tokenizer):
    """The guide reuses whatever the folder holds, and evaluates on the newest test.jsonl of any dataset."""
    root = tmp_path / "data"

    def prompts(config, **kwargs):
        training, _ = load_and_prepare_datasets(config, root, tokenizer, 64, rank=0, **kwargs)
        return [prompt for prompt, _ in texts(training, tokenizer)]

    first = prompts(config)
    assert all(prompt.startswith("Frage: ") for prompt in prompts(changed(config, input_template="Frage: {q}\n")))
    mapped = prompts(changed(config, field_mapping={"q": "a"}))
    assert all("The sum" in prompt for prompt in mapped)
    assert prompts(config, seed=1) != first
    assert len(prompts(changed(config, train_split_ratio=0.5))) == 10
    assert prompts(config) == first
    assert len(list(root.iterdir())) == 5


def test_changed_data_never_meets_old_files(config, tmp_path, tokenizer):
    load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)
    write_lines(tmp_path / "rows.jsonl", [{"q": "new", "a": "new"}] * 10)
    training, validation = load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)
    assert {prompt for dataset in (training, validation) for prompt, _ in texts(dataset, tokenizer)} == {
        "Question: new\n"
    }


def test_the_same_settings_reuse_the_files_and_damaged_ones_are_written_anew(config, tmp_path, tokenizer):
    training, _ = load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)
    (folder,) = (tmp_path / "data").iterdir()
    path = folder / "training.jsonl"
    whole, written = path.read_bytes(), path.stat().st_mtime_ns
    load_and_prepare_datasets(changed(config, num_proc=1), tmp_path / "data", tokenizer, 64, rank=0)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(whole[:100])
    again, _ = load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)
    assert path.read_bytes() == whole
    assert texts(again, tokenizer) == texts(training, tokenizer)


def test_rows_without_output_are_left_out(config, tmp_path, tokenizer):
    write_lines(tmp_path / "rows.jsonl", [*ROWS, {"q": "none", "a": None}, {"q": "blank", "a": " \n"}])
    config = changed(config, train_split_ratio=1.0)
    training, _ = load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)
    assert len(training) == len(ROWS)


def test_a_row_that_cannot_be_used_is_named_with_its_line(config, tmp_path, tokenizer):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('\n{"q": "cut off\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"rows\.jsonl, line 22 cannot be used: not JSON"):
            load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)


def test_a_mistyped_template_leaves_no_finished_folder(config, tmp_path, tokenizer):
    wrong = changed(config, input_template="{qq}")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"Did you mean q\?"):
            load_and_prepare_datasets(wrong, tmp_path / "data", tokenizer, 64, rank=0)
    assert list((tmp_path / "data").rglob("manifest.json")) == []


def test_other_ranks_write_nothing(config, tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError):
        load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=1)
    load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=0)
    training, _ = load_and_prepare_datasets(config, tmp_path / "data", tokenizer, 64, rank=1)
    assert len(training) == 18
