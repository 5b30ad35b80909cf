"""Broken and odd files: each is one message, or costs exactly the rows that are broken and not a word of the others."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from manta.config import Config
from manta.data import prepare
from manta.data.lines import MAX_ROW_BYTES
from manta.data.prepare import Prepared
from manta.errors import UserError
from tiny import tiny_tokenizer

TEMPLATES = {"input_template": "{q}\n", "output_template": "{a}"}
LONG = "the capital of France " * 500_000  # 11 MB

Content = bytes | Callable[[], bytes]


def lines(*rows: Any) -> bytes:
    """A row a line: bytes as they are, anything else as JSON."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def array(*rows: Any) -> bytes:
    return b"[" + b",\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"]"


def qa(number: int) -> dict[str, Any]:
    return {"q": f"What is {number}?", "a": f"It is {number}."}


MANY = lines(*(qa(number) for number in range(5000)))

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Paris."}]}


def talk(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def call(*calls: Any) -> dict[str, Any]:
    return talk(USER, {"role": "assistant", "content": None, "tool_calls": list(calls)})


def called(name: str, arguments: Any) -> str:
    """A call as the template of Qwen 2.5 writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# File → what the message must say besides its name.
WHOLE: dict[str, tuple[str, Content, list[str]]] = {
    "gzip cut off": ("rows.jsonl.gz", gzip.compress(MANY)[:-2000], ["cut off", "Get it again"]),
    "gzip of CSV cut off": ("rows.csv.gz", gzip.compress(b"q,a\n" + b"x,y\n" * 9000)[:-20], ["cut off"]),
    "gzip of an array cut off": (
        "rows.json.gz",
        gzip.compress(array(*(qa(number) for number in range(5000))))[:-2000],
        ["cut off"],
    ),
    "gzip with a wrong checksum": ("rows.jsonl.gz", gzip.compress(MANY)[:-8] + b"12345678", ["damaged", "CRC"]),
    "gzip with something after it": ("rows.jsonl.gz", gzip.compress(MANY) + b"more", ["damaged", "Not a gzipped file"]),
    "gz that is not gzip": ("rows.jsonl.gz", MANY, ["damaged", "Not a gzipped file"]),
    "array cut off in an element": ("rows.json", array(qa(1), qa(2), qa(3))[:-10], ["after 2 elements", "cut off"]),
    "array cut off after a comma": ("rows.json", array(qa(1), qa(2), b"")[:-1], ["after 2 elements", "cut off"]),
    "array without its bracket": ("rows.json", array(qa(1), qa(2))[:-1], ["cut off"]),
    "array with a broken element": ("rows.json", array(qa(1), b'{"q": }', qa(2)), ["after 1 element,", "'}"]),
    "array without a comma": ("rows.json", b'[{"q": "x"} {"q": "y"}]', ["after 0 elements", "',' delimiter"]),
    "array and more": ("rows.json", array(qa(1)) + lines(qa(2)), ["after 1 element,", "follows its end"]),
    "array nested too deeply": ("rows.json", array(qa(1), b"[" * 100_000), ["after 1 element,", "nested too deeply"]),
    "array with a number of 10,000 digits": (
        "rows.json",
        array(qa(1), b'{"q": ' + b"9" * 10_000 + b"}"),
        ["after 1 element,", "digits"],
    ),
    "array with an element that never ends": (
        "rows.json",
        lambda: b'[{"a": 1}, {"a": "' + b"x" * (MAX_ROW_BYTES + (2 << 20)),
        ["after 1 element,", "no end in 16 MiB"],
    ),
    "array as the first line": ("rows.jsonl", lines([1], qa(1)), ["JSON array", "follows its end"]),
    "one object over several lines": (
        "rows.json",
        json.dumps(qa(1), indent=2).encode(),
        ["one JSON object over several lines", "one object per line"],
    ),
    "objects over several lines": ("rows.jsonl", json.dumps(qa(1), indent=2).encode() * 3, ["not JSON"]),
    "CSV with an open quote": ("rows.csv", b'q,a\nx,y\n"open,z\nb,c\nd,e\n', ["quote", "line 6"]),
    "CSV with a quote that another row closes": (
        "rows.csv",
        b'q,a\nx,y\n"open,z\nb,c\nd,"e"\nf,g\n',
        ["quote", "before line 6"],
    ),
    "CSV with a column twice": ("rows.csv", b"q,a,q\nx,y,z\n", ["names a column twice", "['q', 'a', 'q']"]),
    "CSV with a value over the limit": (
        "rows.csv",
        lambda: b"q,a\nx,y\nx," + b"y" * (MAX_ROW_BYTES + 1) + b"\nz,w\n",
        ["field larger", "line 4"],
    ),
    "CSV with nothing but a header": ("rows.csv", b"q,a\n", ["no rows"]),
    "UTF-16": ("rows.jsonl", lines(qa(1)).decode().encode("utf-16"), ["UTF-16", "iconv"]),
    "UTF-16 without a mark": ("rows.jsonl", lines(qa(1)).decode().encode("utf-16-le"), ["not text"]),
    "CSV in UTF-16": ("rows.csv", "q,a\nx,y\n".encode("utf-16"), ["UTF-16", "iconv"]),
    "binary": ("rows.jsonl", bytes(range(256)) * 40, ["not text"]),
    "binary without a zero": ("rows.jsonl", bytes(range(128, 256)) * 40, ["not valid UTF-8"]),
    "Parquet that is none": ("rows.parquet", b"PAR1 and nothing more", ["cannot be read"]),
    "empty file": ("rows.jsonl", b"", ["no rows"]),
    "empty gzip": ("rows.jsonl.gz", b"", ["no rows"]),
    "nothing but space": ("rows.jsonl", b" \n\r\n\t\n", ["no rows"]),
    "no line is a row": ("rows.jsonl", b"once upon a time\nthere was\n", ["not JSON", "--hfdc_dataset_name"]),
}


@dataclass(frozen=True)
class Partly:
    """A file that can be used: row → reason of what is put aside, row → answer of the rest, finding → rows."""

    name: str
    content: Content
    bad: dict[int, str]
    good: dict[int, str]
    noted: dict[str, int] = field(default_factory=dict)


PARTLY = {
    "invalid UTF-8 in a line": Partly(
        "rows.jsonl",
        lines(qa(1), b'{"q": "x", "a": "\xff"}', qa(2)),
        {1: "not valid UTF-8"},
        {0: "It is 1.", 2: "It is 2."},
    ),
    "invalid UTF-8 in a row of a CSV": Partly(
        "rows.csv", b"q,a\nx,y\nz,\xe9\n\xff,w\nv,caf\xc3\xa9\n", dict.fromkeys([1, 2], "UTF-8"), {0: "y", 3: "café"}
    ),
    "invalid UTF-8 in an array": Partly(
        "rows.json", array(qa(1), b'{"q": "x", "a": "\xff"}', qa(2)), {1: "UTF-8"}, {0: "It is 1.", 2: "It is 2."}
    ),
    "array named jsonl": Partly("rows.jsonl", array(qa(1), qa(2)), {}, {0: "It is 1.", 1: "It is 2."}),
    "array over many lines, with a mark in front": Partly(
        "rows.json",
        b"\xef\xbb\xbf\n " + json.dumps([qa(1), qa(2)], indent=4).encode(),
        {},
        {0: "It is 1.", 1: "It is 2."},
    ),
    "array of other things": Partly(
        "rows.json",
        array(qa(1), 1, None, "x", [2], qa(2)),
        dict.fromkeys([1, 2, 3, 4], "where an object is expected"),
        {0: "It is 1.", 5: "It is 2."},
    ),
    "array with a number of 30 digits": Partly("rows.json", array({"q": 10**30, "a": 1.10}), {}, {0: "1.1"}),
    "lines that are no objects": Partly(
        "rows.jsonl",
        lines(qa(1), [1], 2, "text", None, True, 1.5, qa(2)),
        dict.fromkeys([1, 2, 3, 4, 5, 6], "where an object is expected"),
        {0: "It is 1.", 7: "It is 2."},
    ),
    "lines that are not JSON": Partly(
        "rows.jsonl",
        lines(qa(1), b'{"q": "cut', b"{'q': 'x'}", b'{"q": "x"},', b'{"q": "x"}{"q": "y"}', qa(2)),
        dict.fromkeys([1, 2, 3, 4], "not JSON"),
        {0: "It is 1.", 5: "It is 2."},
    ),
    "half of a surrogate pair": Partly(
        "rows.jsonl",
        lines(qa(1), b'{"q": "\\ud800", "a": "x"}', b'{"q": "x", "\\udc00": ""}', b'{"q": "x", "a": "\\ud83d\\ude42"}'),
        dict.fromkeys([1, 2], "surrogate"),
        {0: "It is 1.", 3: "🙂"},
    ),
    "half of a surrogate pair in an array": Partly(
        "rows.json",
        array(qa(1), b'{"q": "\\ud800", "a": "x"}', b'{"q": "x", "a": "\\ud83d\\ude42"}'),
        {1: "surrogate"},
        {0: "It is 1.", 2: "🙂"},
    ),
    "100,000 brackets": Partly(
        "rows.jsonl",
        lines(qa(1), b'{"q": ' + b"[" * 100_000, b'{"q": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", qa(2)),
        dict.fromkeys([1, 2], "nested too deeply"),
        {0: "It is 1.", 3: "It is 2."},
    ),
    "number of 10,000 digits": Partly(
        "rows.jsonl",
        lines(qa(1), b'{"q": ' + b"9" * 10_000 + b', "a": "x"}', qa(2)),
        {1: "digits"},
        {0: "It is 1.", 2: "It is 2."},
    ),
    "numbers, truth and nothing": Partly(
        "rows.jsonl",
        lines({"q": None, "a": 7}, {"q": 1, "a": True}, b'{"q": 1, "a": 1e5}', {"q": 1, "a": [1, None]}),
        {},
        {0: "7", 1: "True", 2: "100000.0", 3: "[1, null]"},
    ),
    "blank lines": Partly(
        "rows.jsonl",
        b"\n \n" + lines(qa(1), b"", b"\t", qa(2)) + b"\n",
        {},
        {2: "It is 1.", 5: "It is 2."},
        {"blank_line": 5},
    ),
    "missing fields and empty answers": Partly(
        "rows.jsonl",
        lines(qa(1), {"q": "x"}, {"a": "y"}, {}, {"q": "x", "a": ""}, {"q": "x", "a": None}, {"q": "x", "a": " \n"}),
        {},
        {0: "It is 1.", 2: "y"},
        {"empty_output": 5},
    ),
    "a key twice": Partly(
        "rows.jsonl", lines(b'{"q": "x", "a": "first", "a": "last"}', qa(1)), {}, {0: "last", 1: "It is 1."}
    ),
    "CRLF": Partly("rows.jsonl", lines(qa(1), qa(2)).replace(b"\n", b"\r\n"), {}, {0: "It is 1.", 1: "It is 2."}),
    "no newline at the end": Partly("rows.jsonl", lines(qa(1), qa(2))[:-1], {}, {0: "It is 1.", 1: "It is 2."}),
    "cut off in the last line": Partly("rows.jsonl", lines(qa(1), qa(2))[:-9], {1: "not JSON"}, {0: "It is 1."}),
    "UTF-8 with a mark": Partly("rows.jsonl", b"\xef\xbb\xbf" + lines(qa(1)), {}, {0: "It is 1."}),
    "CSV with a mark": Partly("rows.csv", b'\xef\xbb\xbf"q",a\nx,y\n', {}, {0: "y"}),
    "CSV with quoted newlines and quotes": Partly(
        "rows.csv",
        b'q,a\n"two\nlines","say ""hi"", he said"\n5" wide,\xe2\x80\xa8z\n"","x\r\ny"\n',
        {},
        {0: 'say "hi", he said', 1: "\u2028z", 2: "x\r\ny"},
    ),
    "CSV with CRLF and a blank line": Partly(
        "rows.csv", b"q,a\r\nx,y\r\n\r\nz,w\r\n", {}, {0: "y", 2: "w"}, {"blank_line": 1}
    ),
    "CSV with rows too wide and too narrow": Partly(
        "rows.csv",
        b'q,a\nx,y\n"1\n",2,3\n1\nz,w\n',
        {1: "3 values under 2 columns", 2: "1 values under 2 columns"},
        {0: "y", 3: "w"},
    ),
    "gzip in two parts": Partly(
        "rows.jsonl.gz",
        gzip.compress(lines(qa(1), b"{")) + gzip.compress(lines(qa(2))),
        {1: "not JSON"},
        {0: "It is 1.", 2: "It is 2."},
    ),
    "row of 11 MB": Partly(
        "rows.jsonl",
        lambda: lines(qa(1), {"q": "x", "a": LONG}, qa(2)),
        {},
        {0: "It is 1.", 1: LONG, 2: "It is 2."},
        {"truncated": 1},
    ),
    "row over the limit": Partly(
        "rows.jsonl",
        lambda: lines(qa(1), {"q": "x", "a": "x" * MAX_ROW_BYTES}, qa(2)),
        {1: "longer than 16 MiB"},
        {0: "It is 1.", 2: "It is 2."},
    ),
    "row over the limit at the end": Partly(
        "rows.jsonl",
        lambda: lines(qa(1)) + b'{"q": "x", "a": "' + b"x" * MAX_ROW_BYTES,
        {1: "longer than 16 MiB"},
        {0: "It is 1."},
    ),
    "messages that are none": Partly(
        "rows.jsonl",
        lines(TALK, talk(), *({"messages": value} for value in (None, 7, "hello", "[{]", USER)), {"other": 1}),
        dict.fromkeys(range(1, 8), "no messages"),
        {0: "Paris."},
    ),
    "messages as text": Partly(
        "rows.jsonl",
        lines(TALK, {"messages": json.dumps([USER, ANSWER])}),
        {},
        {0: "Paris.", 1: "Because."},
    ),
    "messages that are not objects": Partly(
        "rows.jsonl",
        lines(TALK, talk("Why?", ANSWER), talk(USER, None), talk(USER, [ANSWER])),
        {1: "message 1 is not an object", 2: "message 2 is not an object", 3: "message 2 is not an object"},
        {0: "Paris."},
    ),
    "unknown roles": Partly(
        "rows.jsonl",
        lines(TALK, *(talk({"role": role, "content": "x"}, USER, ANSWER) for role in ("narrator", 3, None, ["user"]))),
        dict(enumerate((f"unknown role {role}" for role in ("'narrator'", "3", "None", r"['user']")), 1)),
        {0: "Paris."},
    ),
    "system messages out of place": Partly(
        "rows.jsonl",
        lines(
            TALK,
            talk(SYSTEM, SYSTEM, USER, ANSWER),
            talk(USER, ANSWER, SYSTEM, USER, ANSWER),
            talk(SYSTEM, USER, ANSWER),
        ),
        {1: "two system messages", 2: "a system message after the first"},
        {0: "Paris.", 3: "Because."},
    ),
    "empty content": Partly(
        "rows.jsonl",
        lines(
            TALK,
            talk({"role": "user", "content": ""}, ANSWER),
            talk(USER, {"role": "assistant", "content": " \n"}),
            talk({"role": "user"}, ANSWER),
            talk({"role": "system", "content": ""}, USER, ANSWER),
        ),
        {1: "message 1 (user) has no", 2: "message 2 (assistant) has no", 3: "message 1 (user) has no"},
        {0: "Paris.", 4: "Because."},
    ),
    "nulls in messages": Partly(
        "rows.jsonl",
        lines(
            TALK,
            talk({"role": "user", "content": None}, ANSWER),
            talk(USER, {"role": "assistant", "content": None, "tool_calls": None}),
            talk(USER, {**ANSWER, "tool_calls": None, "name": None, "weight": None, "reasoning_content": None}),
            call({"id": None, "type": "function", "function": {"name": "find", "arguments": {"near": None}}}),
        ),
        {1: "message 1 (user) has no content", 2: "message 2 (assistant) has no content"},
        {0: "Paris.", 3: "Because.", 4: called("find", {"near": None})},
    ),
    "no one asks, no one answers": Partly(
        "rows.jsonl",
        lines(TALK, talk(USER), talk(SYSTEM, USER, USER), talk(ANSWER), talk(SYSTEM)),
        {1: "no assistant message", 2: "no assistant message", 3: "no user message", 4: "no user message"},
        {0: "Paris."},
    ),
    "weights": Partly(
        "rows.jsonl",
        lines(TALK, *(talk(USER, {**ANSWER, "weight": weight}) for weight in (0.5, "1", [1], 0, 1))),
        {1: "weight 0.5", 2: "weight '1'", 3: "weight [1]", 4: "no message to train on"},
        {0: "Paris.", 5: "Because."},
    ),
    "content that is not text": Partly(
        "rows.jsonl",
        lines(
            TALK,
            talk({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}, ANSWER),
            talk({"role": "user", "content": 7}, ANSWER),
            talk({"role": "user", "content": ["Why?"]}, ANSWER),
            talk({"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ANSWER),
        ),
        dict.fromkeys([1, 2, 3], "message 1 has content that is not text"),
        {0: "Paris.", 4: "Because."},
    ),
    "tool calls without a name": Partly(
        "rows.jsonl",
        lines(
            TALK,
            call({"type": "function", "function": {"arguments": "{}"}}),
            call({"type": "function", "function": {"name": None}}),
            call({"function": "find"}),
            call(None),
            call({"name": "find", "arguments": '{"x": 1}'}),
        ),
        dict.fromkeys([1, 2, 3, 4], "message 2 has a tool call without a function name"),
        {0: "Paris.", 5: called("find", {"x": 1})},
    ),
    "tool calls that are no list": Partly(
        "rows.jsonl",
        lines(
            TALK, *(talk(USER, {**ANSWER, "tool_calls": calls}) for calls in ({"name": "find"}, "find()", 7, "", []))
        ),
        dict.fromkeys([1, 2, 3], "message 2 has tool_calls that are not a list"),
        {0: "Paris.", 4: "Because.", 5: "Because."},
        {"duplicates": 1},
    ),
    "tools that are no list of functions": Partly(
        "rows.jsonl",
        lines(
            TALK,
            *(talk(USER, ANSWER, tools=tools) for tools in ("find", {"name": "find"}, ["find"], 7)),
            *(talk(USER, ANSWER, tools=[{"type": "function", "function": function}]) for function in ("find", None)),
            talk(USER, ANSWER, tools=[]),
            talk(USER, ANSWER, tools='[{"name": "find"}]'),
        ),
        {
            **dict.fromkeys([1, 2, 3, 4], "tools is not a list of objects"),
            **dict.fromkeys([5, 6], "the function of a tool is not an object"),
        },
        {0: "Paris.", 7: "Because.", 8: "Because."},
    ),
    "turns that a template refuses": Partly(
        "rows.jsonl",
        lines(TALK, talk(ANSWER, USER, ANSWER)),
        {1: "the chat template refuses it"},
        {0: "Paris."},
    ),
    "from and value": Partly(
        "rows.jsonl",
        lines(
            *(
                {"conversations": [{"from": asks, "value": "Why?"}, {"from": answers, "value": value}]}
                for asks, answers, value in (
                    ("human", "gpt", "So."),
                    ("human", "gpt", None),
                    ("human", "function_call", "no JSON {"),
                    ("nobody", "gpt", "So."),
                )
            )
        ),
        {1: "message 2 (assistant) has no content", 2: "a tool call without", 3: "the unknown role 'nobody'"},
        {0: "So."},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(folder, eos="<|im_end|>")
    return str(folder)


@pytest.fixture
def prepared(model: str, tmp_path: Path) -> Callable[..., Prepared]:
    """Prepare a file of this content, all of it for training."""

    def prepare_file(name: str, content: Content, **settings: Any) -> Prepared:
        content = content if isinstance(content, bytes) else content()
        (tmp_path / name).write_bytes(content)
        is_chat = b'"messages"' in content[:200] or b'"conversations"' in content[:200]
        config = Config.from_dict(
            {
                "hf_model_id": model,
                "data_dir": str(tmp_path / "data"),
                "chat_template": "qwen2_5",
                "max_seq_length": 512,
                "bad_rows_limit": 1.0,
                **settings,
                "hf_dataset_config": {
                    "dataset_name": str(tmp_path / name),
                    "train_split_ratio": 1.0,
                    **({} if is_chat else TEMPLATES),
                },
            }
        )
        found, parts = prepare.locate(config)
        prepare.prepare(config, found, parts, prepare.open_job(config, found), here=True)
        return found

    return prepare_file


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("case", WHOLE)
def test_a_file_that_is_broken_whole_is_one_message_that_says_what_is_wrong(prepared, tmp_path, case):
    name, content, parts = WHOLE[case]
    with pytest.raises(UserError) as caught:
        prepared(name, content)
    message = str(caught.value)
    assert str(tmp_path / name) in message
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1 and len(message) < 600
    assert list((tmp_path / "data").rglob("*")) == []


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case == "row of 11 MB" else []) for case in PARTLY]
)
def test_a_broken_row_costs_that_row_and_no_other(prepared, tmp_path, case):
    wanted = PARTLY[case]
    found = prepared(wanted.name, wanted.content)
    aside = records(found.path / prepare.QUARANTINE)
    assert [bad["row"] for bad in aside] == list(wanted.bad)
    assert all(wanted.bad[bad["row"]] in bad["reason"] for bad in aside), aside
    unit = "line" if "jsonl" in wanted.name and "array" not in case else "row"
    assert [bad["where"] for bad in aside] == [f"{tmp_path / wanted.name}, {unit} {row + 1}" for row in wanted.bad]
    assert {record["row"]: record["output"] for record in records(found.text("training"))} == wanted.good
    assert found.tokenized("training")["row"] == list(wanted.good)
    assert {what: about["rows"] for what, about in found.counts["noted"].items()} == wanted.noted
    assert found.counts["quarantined"] == len(wanted.bad)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [found.path.name]


def test_a_row_as_deep_as_can_be_read_is_written_or_put_aside(prepared):
    """How deep depends on what has been called before: none of them may be read and then not written."""
    deep = [b'{"q": "x", "a": ' + b"[" * depth + b"]" * depth + b"}" for depth in range(800, 1000)]
    found = prepared("rows.jsonl", lines(qa(1), *deep))
    aside = records(found.path / prepare.QUARANTINE)
    assert {bad["reason"] for bad in aside} <= {"nested too deeply"}
    kept = {record["row"]: record["output"] for record in records(found.text("training"))}
    assert sorted([*kept, *(bad["row"] for bad in aside)]) == list(range(201))
    assert all(kept[row] == "[" * (799 + row) + "]" * (799 + row) for row in kept if row)


A_QUARTER_BAD = lines(*(b"[%d]" % number if number % 4 == 1 else qa(number) for number in range(20)))


def test_as_many_bad_rows_as_the_limit_says_are_put_aside(prepared):
    assert prepared("rows.jsonl", A_QUARTER_BAD, bad_rows_limit=0.25).counts["quarantined"] == 5


def test_more_bad_rows_stop_with_the_first_reasons_and_leave_all_of_them_in_a_file(prepared, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared("rows.jsonl", A_QUARTER_BAD, bad_rows_limit=0.24)
    message = str(caught.value)
    assert "5 of 20 rows cannot be used, over bad_rows_limit 0.24" in message and "--bad_rows_limit" in message
    for line in (2, 6, 10):
        assert f"{tmp_path / 'rows.jsonl'}, line {line}: an array where an object is expected" in message
    assert "line 14" not in message
    (kept,) = (tmp_path / "data").rglob("*")
    assert str(kept) in message
    assert [(bad["row"], bad["where"]) for bad in records(kept)] == [
        (number, f"{tmp_path / 'rows.jsonl'}, line {number + 1}") for number in (1, 5, 9, 13, 17)
    ]
    assert all("object is expected" in bad["reason"] for bad in records(kept))


@pytest.mark.parametrize("case", ["gzip cut off", "CSV with an open quote", "array cut off in an element"])
def test_the_command_line_prints_the_message_alone(model, tmp_path, case):
    name, content, parts = WHOLE[case]
    (tmp_path / name).write_bytes(content)
    flags = {"hf_model_id": model, "hfdc_dataset_name": str(tmp_path / name), "data_dir": str(tmp_path / "data")}
    process = subprocess.run(
        [sys.executable, "-m", "manta", "prepare", *(f"--{flag}={value}" for flag, value in flags.items())],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    message = process.stderr.strip()
    assert message.startswith("manta: ") and str(tmp_path / name) in message
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1 and "Traceback" not in message
