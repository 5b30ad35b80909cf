"""Messages of any make become those that chat templates take, or the reason why they cannot."""

import json

import pytest

from manta.data import formats
from manta.data.formats import Conversation
from manta.data.lines import BadRow

ASKED = {"role": "user", "content": "What is 2?"}
ANSWERED = {"role": "assistant", "content": "Two."}
MESSAGES = [ASKED, ANSWERED]


def reason(messages, **row):
    with pytest.raises(BadRow) as caught:
        formats.conversation(messages, row)
    return str(caught.value)


@pytest.mark.parametrize(
    ("said", "role"),
    [
        *((name, "system") for name in ("system", "developer")),
        *((name, "user") for name in ("user", "human")),
        *((name, "assistant") for name in ("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard")),
        *((name, "tool") for name in ("tool", "function", "observation", "tool_response", "ipython")),
    ],
)
def test_roles_in_the_wild_become_those_of_chat_templates(said, role):
    before = [] if role == "system" else [ASKED]
    after = [ANSWERED] if role == "assistant" else [ASKED, ANSWERED]
    for said_by, text in (("role", "content"), ("from", "value")):
        talk = formats.conversation([*before, {said_by: said, text: "x"}, *after], {})
        assert talk.messages[len(before)] == {"role": role, "content": "x"}


@pytest.mark.parametrize("arguments", [{"a": {"b": ["ü", 1.5, None]}}, '{"a": {"b": ["ü", 1.5, null]}}'])
def test_arguments_are_values_however_they_are_written(arguments):
    call = {"id": "call_1", "type": "function", "function": {"name": "double", "arguments": arguments}, "index": 0}
    bare = {"name": "double", "arguments": arguments}
    for calls in ([call], json.dumps([call])):
        said = {"role": "assistant", "content": None, "tool_calls": calls}
        talk = formats.conversation([ASKED, said], {})
        function = {"name": "double", "arguments": {"a": {"b": ["ü", 1.5, None]}}}
        assert talk.messages[1]["tool_calls"] == [{"type": "function", "function": function, "id": "call_1"}]
    assert formats.conversation([ASKED, {"role": "assistant", "tool_calls": [bare]}], {}).messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }


def test_parts_of_text_are_joined_and_reasoning_has_one_name():
    parts = [{"type": "text", "text": "Tw"}, {"type": "text", "text": "o."}]
    for name in ("reasoning_content", "reasoning", "thinking"):
        talk = formats.conversation([ASKED, {"role": "assistant", "content": parts, name: "hm", "name": "Bo"}], {})
        assert talk.messages[1] == {"role": "assistant", "content": "Two.", "reasoning_content": "hm", "name": "Bo"}
    blank = formats.conversation([ASKED, {**ANSWERED, "thinking": " \n"}], {})
    assert blank.messages[1] == ANSWERED


def test_turns_after_the_last_trained_one_are_cut_off():
    for more in ([ASKED], [ASKED, {**ANSWERED, "train": False}], [{"role": "tool", "content": "4"}, ASKED]):
        assert formats.conversation([*MESSAGES, *more], {}) == Conversation(MESSAGES, (1,))
    assert formats.conversation([*MESSAGES, *MESSAGES], {}, "last") == Conversation([*MESSAGES, *MESSAGES], (3,))


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (None, "no messages"),
        ([], "no messages"),
        ("hello", "no messages"),
        ('{"role": "user"}', "no messages"),
        (["hello"], "message 1 is not an object"),
        ([{"role": "robot", "content": "x"}], "message 1 has the unknown role 'robot'"),
        ([{"content": "x"}], "message 1 has the unknown role None"),
        ([{"role": ["user"], "content": "x"}], "message 1 has the unknown role ['user']"),
        ([ASKED, {"role": "x" * 90, "content": "x"}], f"message 2 has the unknown role '{'x' * 36}…"),
        ([ASKED], "no assistant message"),
        ([ANSWERED], "no user message"),
        ([{"role": "user", "content": " \n"}, ANSWERED], "message 1 (user) has no content"),
        ([ASKED, {"role": "assistant"}], "message 2 (assistant) has no content"),
        ([ASKED, {"role": "assistant", "content": 4}], "message 2 has content that is not text"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWERED],
            "message 1 has content that is not text",
        ),
        ([ASKED, {"role": "system", "content": "x"}, ANSWERED], "a system message after the first"),
        ([{"role": "system", "content": "x"}] * 2 + MESSAGES, "two system messages"),
        ([ASKED, {"role": "assistant", "tool_calls": 4}], "message 2 has tool_calls that are not a list"),
        ([ASKED, {"role": "assistant", "tool_calls": [{}]}], "message 2 has a tool call without a function name"),
        ([ASKED, {"from": "function_call", "value": "double(2)"}], "message 2 has a tool call without a function name"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(messages, why):
    assert reason(messages) == why


def test_tools_that_are_no_list_of_objects_are_said():
    for tools in ("double", {"name": "double"}, ["double"], "[1]"):
        assert reason(MESSAGES, tools=tools) == "tools is not a list of objects"


def test_an_empty_system_message_is_none_of_a_bad_row():
    talk = formats.conversation([{"role": "system", "content": ""}, *MESSAGES], {})
    assert talk.messages[0] == {"role": "system", "content": ""}
