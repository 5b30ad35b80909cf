import csv
import json

import pytest
from datasets import Dataset

from manta.config import Config
from manta.data import formats
from manta.data.formats import Conversation, Pair
from manta.data.lines import BadRow
from manta.data.source import open_source
from manta.dataset_config import HFDatasetConfig
from manta.errors import ConfigError

ASKED = {"role": "user", "content": "What is 2?"}
ANSWERED = {"role": "assistant", "content": "Two."}
MESSAGES = [ASKED, ANSWERED]
SHARED = [{"from": "human", "value": "What is 2?"}, {"from": "gpt", "value": "Two."}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "double", "description": "Twice.", "parameters": PARAMETERS}}
OWN = {"input_template": "Q: {q}\n", "output_template": "{a}"}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.fixture
def open_rows(tmp_path):
    """Rows → the Source that Manta opens, from a JSONL, CSV or Parquet file; `settings` are those of the data."""

    def opened(*rows, kind="jsonl", **settings):
        path = tmp_path / f"rows.{kind}"
        if kind == "parquet":
            Dataset.from_list(list(rows)).to_parquet(path)
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                if kind == "csv":
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(
                        {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows
                    )
                else:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
        return open_source(HFDatasetConfig(dataset_name=str(path), **settings), tmp_path / "cache")

    return opened


def read(source, objective="sft"):
    """(the format, what each row means)."""
    found = formats.detect(source, objective)
    reader = formats.reader(found, source.config, objective)
    return found, [reader(row) for row in source]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": MESSAGES}, "messages"),
        ({"conversations": SHARED}, "conversations"),
        ({"conversations": MESSAGES}, "messages"),
        ({"messages": MESSAGES, "prompt": "x", "completion": "y", "text": "z"}, "messages"),
        ({"conversations": SHARED, "instruction": "x", "output": "y"}, "conversations"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt_completion"),
    ],
)
def test_conversations_are_told_by_their_columns(open_rows, row, found, kind):
    source = open_rows(row, row, kind=kind)
    assert read(source) == (found, [Conversation(MESSAGES, (1,))] * 2)
    assert formats.is_chat(found, source)
    assert formats.describe(found, source) == f"{found}, told by the columns {', '.join(row)}"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_prompt_and_completion_are_told_by_their_columns(open_rows, kind):
    source = open_rows({"prompt": "2+2 is", "completion": " 4", "id": "a"}, kind=kind)
    assert read(source) == ("prompt_completion", [Pair("2+2 is", " 4")])
    assert not formats.is_chat("prompt_completion", source)


def test_alpaca_is_told_by_its_columns_and_its_input_may_lack(open_rows):
    prompt = "### Instruction:\nAdd.\n### Input:\n{}\n### Response:\n"
    assert read(open_rows(ALPACA)) == ("alpaca", [Pair(prompt.format("1 and 2"), "3")])
    without = {"instruction": "Add.", "output": "3"}
    assert read(open_rows(without)) == ("alpaca", [Pair(prompt.format(""), "3")])
    assert read(open_rows({**ALPACA, "input": None})) == ("alpaca", [Pair(prompt.format(""), "3")])


def test_plain_text_is_for_continual_pretraining(open_rows):
    source = open_rows({"text": "All of this."})
    with pytest.raises(ConfigError, match=r"rows.jsonl holds plain text.*--objective cpt.*--hfdc_output_template"):
        formats.detect(source, "sft")
    assert read(source, "cpt") == ("text", [Pair("", "All of this.")])
    assert not formats.is_chat("text", source)
    with_more = open_rows({"text": "All of this.", "url": "x", "instruction": "i", "output": "o"})
    assert read(with_more, "cpt") == ("text", [Pair("", "All of this.")])


def test_columns_that_tell_nothing_are_asked_for_by_the_templates(open_rows):
    with pytest.raises(ConfigError, match=r"asks for \{output\}, but the data has the columns \['q', 'a'\]"):
        formats.detect(open_rows({"q": "2+2?", "a": "4"}), "sft")


@pytest.mark.parametrize(
    "row",
    [{"messages": MESSAGES}, {"prompt": "x", "completion": "y"}, {"text": "z"}, ALPACA, {"conversations": SHARED}],
)
def test_templates_of_the_users_own_win_over_every_column(open_rows, row):
    source = open_rows({**row, "q": "2+2?", "a": "4"}, **OWN)
    assert read(source) == ("template", [Pair("Q: 2+2?\n", "4")])
    assert formats.describe("template", source) == "template, as written in the config"


def test_a_mapping_alone_says_what_a_row_means(open_rows):
    source = open_rows({**ALPACA, "context": "3 and 4"}, field_mapping={"input": "context"})
    assert read(source) == ("template", [Pair("### Instruction:\nAdd.\n### Input:\n3 and 4\n### Response:\n", "3")])


def test_a_format_that_is_set_is_not_told_by_columns(open_rows):
    row = {"messages": MESSAGES, "prompt": "2+2 is", "completion": " 4", **ALPACA}
    source = open_rows(row, format="prompt_completion")
    assert read(source) == ("prompt_completion", [Pair("2+2 is", " 4")])
    assert formats.describe("prompt_completion", source) == "prompt_completion, as set"
    assert read(open_rows(row, format="alpaca"))[0] == "alpaca"
    assert read(
        open_rows(row, format="template", **{**OWN, "input_template": "{prompt}", "output_template": "{output}"})
    )[1] == [Pair("2+2 is", "3")]
    assert read(open_rows({"text": "x", "output": "y"}, format="template", output_template="{text}"), "cpt") == (
        "template",
        [Pair("", "x")],
    )


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("messages", r"The format messages needs a column messages, but the data has \['a'\]"),
        ("conversations", "needs a column conversations"),
        ("prompt_completion", "needs a column prompt"),
        ("alpaca", r"asks for \{(instruction|output)\}"),
        ("text", "plain text"),
    ],
)
def test_a_format_whose_columns_are_not_there_is_refused(open_rows, format, message):
    with pytest.raises(ConfigError, match=message):
        formats.detect(open_rows({"a": "x"}, format=format), "sft")


@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"conversations": SHARED}, {"prompt": "a", "completion": "b"}])
def test_continual_pretraining_takes_no_conversations(open_rows, row):
    column = next(iter(row))
    settings = {"format": "prompt_completion" if column == "prompt" else column}
    with pytest.raises(ConfigError, match=f"format {settings['format']} is trained on with --objective sft"):
        formats.detect(open_rows(row, **settings), "cpt")


def test_continual_pretraining_takes_no_chat(open_rows):
    for row in ({"text": "x"}, ALPACA):
        with pytest.raises(ConfigError, match="chat is trained on with --objective sft"):
            formats.detect(open_rows(row, chat=True), "cpt")


def test_chat_makes_turns_of_instruction_and_input(open_rows):
    source = open_rows(ALPACA, {**ALPACA, "input": ""}, chat=True)
    asked = [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "user", "content": "Add."}]
    answered = {"role": "assistant", "content": "3"}
    assert read(source) == ("alpaca", [Conversation([each, answered], (1,)) for each in asked])
    assert formats.is_chat("alpaca", source)


def test_chat_makes_turns_of_templates_and_of_prompt_and_completion(open_rows):
    turns = [{"role": "user", "content": "Q: 2+2?\n"}, {"role": "assistant", "content": "4"}]
    assert read(open_rows({"q": "2+2?", "a": "4"}, chat=True, **OWN)) == ("template", [Conversation(turns, (1,))])
    source = open_rows({"prompt": "Q: 2+2?\n", "completion": "4"}, chat=True)
    assert read(source) == ("prompt_completion", [Conversation(turns, (1,))])


def test_a_prompt_of_messages_trains_the_completion_only(open_rows):
    prompt = [{"role": "system", "content": "Brief."}, ASKED, {"role": "assistant", "content": "Not trained."}, ASKED]
    _, (talk,) = read(open_rows({"prompt": prompt, "completion": [ANSWERED, ASKED, ANSWERED], "tools": [TOOL]}))
    assert talk == Conversation([*prompt, ANSWERED, ASKED, ANSWERED], (4, 6), [TOOL])
    _, (last,) = read(open_rows({"prompt": prompt, "completion": [ANSWERED, ASKED, ANSWERED]}, train_on="last"))
    assert last.trained == (6,)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("List the people.", '[{"name": "Ann"}, {"name": "Bo"}]'),
        ("Write the messages.", '[{"role": "user", "content": "Hi"}]'),
        ('[{"name": "Ann"}]', '[{"role": "clerk"}]'),
        ("What does list() print?", "[]"),
        ("[]", "[]"),
        ('{"a": 1}', '{"a": 2}'),
        ("[1, 2", "[1, 2]"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_text_that_looks_like_json_stays_text(open_rows, prompt, completion, kind):
    source = open_rows({"prompt": prompt, "completion": completion}, kind=kind)
    assert not formats.is_chat("prompt_completion", source)
    assert read(source) == ("prompt_completion", [Pair(prompt, completion)])


@pytest.mark.parametrize(
    "row", [{"prompt": "x", "completion": [ANSWERED]}, {"prompt": [ASKED], "completion": "y"}, {"prompt": "x"}]
)
def test_one_text_and_one_list_of_messages_are_a_bad_row(row):
    with pytest.raises(BadRow, match="must be two texts or two lists of messages"):
        formats.reader("prompt_completion", HFDatasetConfig(), "sft")(row)


def test_sharegpt_calls_and_observations_become_tool_calls_and_results(open_rows):
    turns = [
        {"from": "human", "value": "Twice 2?"},
        {"from": "function_call", "value": '{"name": "double", "arguments": {"a": 2}}'},
        {"from": "observation", "value": '{"result": 4}'},
        {"from": "gpt", "value": "Four."},
    ]
    tools = json.dumps([{"name": "double", "description": "Twice.", "parameters": PARAMETERS}])
    found, (talk,) = read(open_rows({"conversations": turns, "tools": tools}))
    call = {"type": "function", "function": {"name": "double", "arguments": {"a": 2}}}
    assert found == "conversations"
    assert talk.messages == [
        {"role": "user", "content": "Twice 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"result": 4}'},
        {"role": "assistant", "content": "Four."},
    ]
    assert talk.trained == (1, 3)
    assert talk.tools == [TOOL]


@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tools_may_be_text_bare_or_named_functions(open_rows, column, kind):
    for tools in ([TOOL], [TOOL["function"]], json.dumps([TOOL])):
        _, (talk,) = read(open_rows({"messages": MESSAGES, column: tools}, kind=kind))
        assert talk.tools == [TOOL]


def test_no_tools_are_none(open_rows):
    for tools in (None, [], "", "[]"):
        assert read(open_rows({"messages": MESSAGES, "tools": tools}))[1][0].tools is None


def test_the_parts_of_a_mixture_inherit_and_override(tmp_path):
    data = Config.from_dict(
        {
            "hf_dataset_config": {
                "dataset_name": "unused",
                "train_on": "last",
                "chat": True,
                "split": "all",
                "train_split_ratio": 0.5,
                "mixture": [
                    {"dataset_name": "a.jsonl", "weight": 0.5},
                    {"dataset_name": "b.jsonl", "train_on": "all", "chat": False, "format": "alpaca"},
                ],
            }
        }
    ).hf_dataset_config
    first, second = data.parts()
    assert (first.dataset_name, first.weight, first.train_on, first.chat, first.split) == (
        *("a.jsonl", 0.5, "last", True, "all"),
    )
    assert (second.dataset_name, second.weight, second.train_on, second.chat, second.format) == (
        *("b.jsonl", 1.0, "all", False, "alpaca"),
    )
    assert {part.train_split_ratio for part in data.parts()} == {0.5}
    assert [part.mixture for part in data.parts()] == [(), ()]
    alone = HFDatasetConfig(dataset_name="a.jsonl")
    assert alone.parts() == [alone]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([{}], r"mixture\[0\] has no dataset_name"),
        ([{"dataset_name": "a"}, {"dataset_name": "b", "weight": 0}], r"mixture\[1\]: weight: .*greater than 0"),
        ([{"dataset_name": "a", "wieght": 2}], r"mixture\[0\]: wieght: Extra inputs are not permitted"),
        ([{"dataset_name": "a", "format": "xml"}], r"mixture\[0\]: format: Input should be 'auto'"),
        ([{"dataset_name": "a", "input_template": "{a.b}"}], r"mixture\[0\]: input_template: \{a.b\} is not a plain"),
        ([{"dataset_name": "a", "field_mapping": {"x": "y"}}], r"mixture\[0\]: field_mapping maps \['x'\]"),
        *(
            (
                [{"dataset_name": "a", name: value}],
                rf"mixture\[0\] sets \['{name}'\], which the datasets have in common",
            )
            for name, value in (("num_proc", 2), ("train_split_ratio", 0.5), ("mixture", []))
        ),
        ("{not json", "mixture: is not JSON"),
        ([3], "mixture"),
    ],
)
def test_a_wrong_mixture_is_a_message(mixture, message):
    with pytest.raises(ConfigError, match=f"^hf_dataset_config[.:].*{message}"):
        Config.from_dict({"hf_dataset_config": {"mixture": mixture}})


def test_a_mixture_may_be_json():
    data = Config.from_dict({"hf_dataset_config": {"mixture": '[{"dataset_name": "a", "weight": 2}]'}})
    assert [(part.dataset_name, part.weight) for part in data.hf_dataset_config.parts()] == [("a", 2.0)]
