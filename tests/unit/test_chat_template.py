"""How a chat template is found, what it is served as, and what of a conversation is trained or missed."""

import re
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import _compile_jinja_template

from manta.data.chat import TODAY, families, load_chat_template, without_markers
from manta.data.formats import conversation
from manta.data.lines import BadRow
from manta.errors import ConfigError
from tiny import tiny_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKER = re.compile(r"\{%-?\s*(?:end)?generation")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CHATML = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Earlier answers are written without what is in brackets, as reasoning is left out by templates of today.
FORGETFUL = (
    "{% for m in messages %}{{ m.role[0] + ': ' + (m.content.split(']')[-1] if m.role == 'assistant' and not loop.last "
    "else m.content) + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
)

TOOL = {"type": "function", "function": {"name": "multiply", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "multiply", "arguments": {"a": 2}}}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Well."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
TOOL_TURNS = [
    {"role": "user", "content": "2*3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "multiply", "tool_call_id": "call00001", "content": "6"},
    {"role": "assistant", "content": "Six."},
]
REASONING = [{"role": "user", "content": "?"}, {"role": "assistant", "reasoning_content": "hm hm", "content": "Six."}]
TALKS = [TURNS, [SYSTEM, *TURNS], TOOL_TURNS, REASONING]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=True)


@pytest.fixture
def own(tokenizer):
    """The tokenizer, with a template of its own until the test ends."""

    def having(template):
        tokenizer.chat_template = template
        return tokenizer

    yield having
    tokenizer.chat_template = None


def talk_of(messages, train_on="all"):
    return conversation(messages, {"tools": [TOOL]} if messages is TOOL_TURNS else {}, train_on)


def texts(rendered):
    return [rendered.text[start:end] for start, end in rendered.trained]


def write(tokenizer, template, messages, **variables):
    """What transformers itself renders on the day that Manta writes, or why it does not."""
    _compile_jinja_template(template or tokenizer.chat_template).globals["strftime_now"] = TODAY.strftime
    tools = [TOOL] if any("tool_calls" in message for message in messages) else None
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=False,
            **{"add_generation_prompt": False, **variables},
        )
    except Exception as error:
        return type(error)


def test_turns_tell_the_same_as_markers(own):
    by_markers = load_chat_template(own(CHATML), None, {})
    by_turns = load_chat_template(own(PLAIN_CHATML), None, {})
    assert (by_markers.marked, by_turns.marked) == (CHATML, None)
    for messages in (TURNS, [SYSTEM, *TURNS], [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]]):
        talk = conversation(messages, {})
        assert by_turns.render(talk) == by_markers.render(talk)
        assert by_turns.render(talk).trained
    assert texts(by_turns.render(talk_of(TURNS))) == ["Hello!<|im_end|>\n", "Well.<|im_end|>\n", "See you.<|im_end|>\n"]


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one_only(own):
    template = load_chat_template(own(FORGETFUL), None, {})
    messages = [{"role": m["role"], "content": f"[{i}]{m['content']}"} for i, m in enumerate(TURNS)]
    with pytest.raises(BadRow, match=r"earlier text otherwise once more follows.*--hfdc_train_on last"):
        template.render(conversation(messages, {}))
    last = conversation(messages, {}, "last")
    rendered = template.render(last, "last")
    assert rendered.text == "u: [0]Hi\na: Hello!\nu: [2]And?\na: Well.\nu: [4]Bye\na: [5]See you.\n"
    assert texts(rendered) == ["[5]See you.\n"]
    assert template.serving_difference(last, rendered) is None


@pytest.mark.parametrize("messages", TALKS)
def test_the_last_turn_is_all_that_follows_the_served_prompt(tokenizer, messages):
    """Qwen 3 leaves out earlier thoughts: its own template is trained on, not the variant that keeps them."""
    original = (TEMPLATES / "qwen3.jinja").read_text()
    rendered = load_chat_template(tokenizer, "qwen3", {}).render(talk_of(messages, "last"), "last")
    prompt = write(tokenizer, original, messages[:-1], add_generation_prompt=True)
    assert rendered.text == write(tokenizer, original, messages)
    assert rendered.trained == ((len(prompt), len(rendered.text)),)
    assert rendered.text.startswith(prompt)


def test_last_falls_back_to_the_marked_template_where_the_prompt_is_no_beginning(tokenizer):
    template = load_chat_template(tokenizer, "deepseekv3", {})
    last = talk_of(TURNS, "last")
    rendered = template.render(last, "last")
    assert texts(rendered) == ["<｜Assistant｜>See you.<｜end▁of▁sentence｜>"]
    assert "<think>" in template.serving_difference(last, rendered)


@pytest.mark.parametrize("mute", [{"train": False}, {"weight": 0}, {"weight": 0.0}])
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3", "gemma3", "phi3", "glm4moe", "gptoss", "deepseekv3"])
def test_a_muted_message_is_in_the_text_and_not_trained(tokenizer, family, mute):
    template = load_chat_template(tokenizer, family, {})
    whole = template.render(talk_of(TURNS))
    assert len(whole.trained) == 3
    for muted in (0, 1):
        turns = [{**m, **mute} if index == 2 * muted + 1 else m for index, m in enumerate(TURNS)]
        rendered = template.render(conversation(turns, {}))
        assert rendered.text == whole.text
        assert rendered.trained == (*whole.trained[:muted], *whole.trained[muted + 1 :])


def test_a_muted_last_message_ends_the_conversation_before_it(tokenizer):
    template = load_chat_template(tokenizer, "llama3", {})
    muted = conversation([*TURNS[:5], {**TURNS[5], "train": False}], {})
    assert template.render(muted) == template.render(conversation(TURNS[:4], {}))


def test_weights_other_than_zero_and_one_train_no_share_of_a_message():
    assert conversation([TURNS[0], {**TURNS[1], "weight": 1, "train": True}], {}).trained == (1,)
    assert conversation([TURNS[0], {**TURNS[1], "weight": None}], {}).trained == (1,)
    with pytest.raises(BadRow, match=r"weight 0\.5; only 0 and 1"):
        conversation([TURNS[0], {**TURNS[1], "weight": 0.5}], {})
    with pytest.raises(BadRow, match="no message to train on"):
        conversation([TURNS[0], {**TURNS[1], "weight": 0}], {})


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "gemma3", "phi3", "qwen3_instruct_2507", "gptoss", "cohere2"])
def test_prompts_in_training_are_those_that_are_served(tokenizer, family):
    template = load_chat_template(tokenizer, family, {})
    assert template.serving_difference(talk_of(TURNS), template.render(talk_of(TURNS))) is None


def test_a_prompt_that_differs_from_the_served_one_is_shown_from_both_sides(tokenizer):
    def difference(family, messages):
        template = load_chat_template(tokenizer, family, {})
        return template.serving_difference(talk_of(messages), template.render(talk_of(messages)))

    assert difference("qwen3", TURNS) == (
        r"after 'm_end|>\n<|im_start|>assistant\n' the model is served 'Hello!<|im_end|>\n<|im_start|>user\nAnd?<|', "
        r"and trained on '<think>\n\n</think>\n\nHello!<|im_end|>\n<|im'"
    )
    assert difference("qwen3", TURNS[:2]) is None
    assert difference("deepseekv3", TURNS) == (
        r"after 'begin|><｜User｜>Hi<｜Assistant｜>' the model is served '<think>\n', "
        r"and trained on 'Hello!<｜end▁of▁sentence｜><｜User｜>And?<｜A'"
    )


@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("family", families())
def test_nothing_differs_from_serving_wherever_the_last_turn_follows_its_prompt(tokenizer, family, messages):
    template = load_chat_template(tokenizer, family, {})
    last = talk_of(messages, "last")
    if messages is TOOL_TURNS and family == "deepseekv3":  # whose own template reads arguments as text
        call = {**CALL, "function": {**CALL["function"], "arguments": '{"a": 2}'}}
        messages = [messages[0], {**messages[1], "tool_calls": [call]}, *messages[2:]]
    original = (TEMPLATES / f"{family}.jinja").read_text()
    whole = write(tokenizer, original, messages)
    prompt = write(tokenizer, original, messages[:-1], add_generation_prompt=True)
    if not (isinstance(whole, str) and isinstance(prompt, str)):
        with pytest.raises(BadRow, match="the chat template refuses it"):
            template.render(last, "last")
        return
    difference = template.serving_difference(last, template.render(last, "last"))
    assert (difference is None) == whole.startswith(prompt)


def test_variables_of_the_template_hold_in_training_and_in_serving(tokenizer):
    quiet = load_chat_template(tokenizer, "qwen3", {"enable_thinking": False})
    last = talk_of(TURNS, "last")
    assert quiet.prompt(last, 5).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    rendered = quiet.render(last, "last")
    assert texts(rendered) == ["See you.<|im_end|>\n"]
    assert quiet.serving_difference(last, rendered) is None
    thinking = load_chat_template(tokenizer, "qwen3", {})
    assert thinking.prompt(last, 5).endswith("<|im_start|>assistant\n")
    assert texts(thinking.render(last, "last")) == ["<think>\n\n</think>\n\nSee you.<|im_end|>\n"]


@pytest.mark.parametrize(
    ("family", "messages", "lost"),
    [
        ("llama3", TOOL_TURNS, "the tool multiply"),
        ("phi3", TOOL_TURNS, "the tool multiply"),
        ("lfm2", TOOL_TURNS, "the tool call of message 2"),
        ("qwen2_5", REASONING, "the reasoning of message 2"),
        ("gemma", REASONING, "the reasoning of message 2"),
        ("qwen2_5", TOOL_TURNS, None),
        ("deepseekv3", TOOL_TURNS, "the tool multiply"),
        ("qwen3", REASONING, None),
        ("gptoss", REASONING, None),
        ("glm4moe", TOOL_TURNS, None),
        ("llama3", TURNS, None),
    ],
)
def test_what_the_template_leaves_out_is_named(tokenizer, family, messages, lost):
    template = load_chat_template(tokenizer, family, {})
    assert template.lost(talk_of(messages), template.render(talk_of(messages))) == lost


def test_an_answer_that_is_cut_by_the_template_is_named(own):
    template = load_chat_template(own(PLAIN_CHATML.replace("m.content", "m.content[:4]")), None, {})
    talk = talk_of(TURNS[:2])
    assert template.lost(talk, template.render(talk)) == "the content of message 2"
    short = conversation([TURNS[0], {"role": "assistant", "content": "Yes."}], {})
    assert template.lost(short, template.render(short)) is None


@pytest.mark.parametrize("family", families())
def test_without_markers_every_training_template_renders_as_with_them(tokenizer, family):
    marked = (TEMPLATES / f"{family}_training.jinja").read_text()
    plain = without_markers(marked)
    assert MARKER.search(marked)
    assert not MARKER.search(plain)
    for messages in TALKS:
        for prompt in (False, True):
            expected = write(tokenizer, marked, messages, add_generation_prompt=prompt)
            assert write(tokenizer, plain, messages, add_generation_prompt=prompt) == expected


# TRL changes more of these: earlier thoughts are kept, or the next role's token ends a turn.
REWRITTEN = {"qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "glm4moe"}


@pytest.mark.parametrize("family", sorted(set(families()) - REWRITTEN))
def test_without_markers_a_training_template_renders_the_original(tokenizer, family):
    plain = without_markers((TEMPLATES / f"{family}_training.jinja").read_text())
    original = (TEMPLATES / f"{family}.jinja").read_text()
    for messages in (TURNS, [SYSTEM, *TURNS], REASONING) if family == "deepseekv3" else TALKS:
        for prompt in (False, True):
            expected = write(tokenizer, original, messages, add_generation_prompt=prompt)
            assert write(tokenizer, plain, messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("begin", ["{% generation %}", "{%- generation %}", "{% generation -%}", "{%-generation-%}"])
@pytest.mark.parametrize("end", ["{% endgeneration %}", "{%- endgeneration %}", "{% endgeneration -%}"])
@pytest.mark.parametrize("space", ["", "  ", "\n", "\n  ", " \n \n"])
def test_a_dash_trims_the_side_that_it_is_on(tokenizer, begin, end, space):
    for marked in (f"a{space}{begin}{space}b{space}{end}{space}c", f"{{{{ 'a' }}}}{space}{begin}b{end}{space}c"):
        plain = without_markers(marked)
        assert not MARKER.search(plain)
        assert write(tokenizer, plain, TURNS) == write(tokenizer, marked, TURNS)


def test_markers_that_a_comment_only_talks_about_mark_nothing(own):
    about = "{#- No {% generation %} / {% endgeneration %} here,\n    by intent. -#}\n"
    template = load_chat_template(own(about + PLAIN_CHATML), None, {})
    assert template.marked is None
    assert not MARKER.search(template.published)
    assert texts(template.render(talk_of(TURNS[:2]))) == ["Hello!<|im_end|>\n"]
    assert template.render(talk_of(TURNS)).text == write(own(PLAIN_CHATML), None, TURNS)


VARIABLES = {
    "enable_thinking": False,
    "reasoning_effort": "high",
    "date_string": "1 März 2031 🙂 '\"{{ }} %}",
    "unset": None,
    "several": [None, True, {"a": 1.5}],
}
TELLS = (
    "\n  \n{{ date_string }}|{{ enable_thinking }}|{{ unset is none }}|{{ several[0] is none }}|{{ several | tojson }}"
)


@pytest.mark.parametrize("wanted", ["qwen3", "gptoss", "glm4moe", str(TEMPLATES / "llama3_2.jinja"), "tells"])
def test_what_is_published_is_served_as_in_training_without_being_told_the_variables(tokenizer, own, wanted):
    template = load_chat_template(own(TELLS + CHATML), None if wanted == "tells" else wanted, VARIABLES)
    assert not MARKER.search(template.published)
    for prompt in (False, True):
        told = write(tokenizer, template.served, TURNS, add_generation_prompt=prompt, **VARIABLES)
        assert isinstance(told, str)
        assert write(tokenizer, template.published, TURNS, add_generation_prompt=prompt) == told


def test_a_client_may_set_a_published_variable_otherwise(tokenizer):
    published = load_chat_template(tokenizer, "qwen3", {"enable_thinking": False}).published
    assert write(tokenizer, published, TURNS[:1], add_generation_prompt=True).endswith("</think>\n\n")
    thinks = write(tokenizer, published, TURNS[:1], add_generation_prompt=True, enable_thinking=True)
    assert thinks.endswith("assistant\n")


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "gemma3"])
def test_without_variables_the_original_is_published_as_it_is(tokenizer, family):
    assert load_chat_template(tokenizer, family, {}).published == (TEMPLATES / f"{family}.jinja").read_text()


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "gptoss"])
def test_a_template_that_trl_trains_with_is_published_without_its_markers(own, tmp_path, family):
    """TRL leaves its training variant in the tokenizers that it saves."""
    marked = (TEMPLATES / f"{family}_training.jinja").read_text()
    (tmp_path / "marked.jinja").write_text(marked)
    for wanted in (None, str(tmp_path / "marked.jinja")):
        template = load_chat_template(own(marked), wanted, {})
        assert template.marked == marked
        assert not MARKER.search(template.published)
        assert write(own(marked), template.published, TURNS) == write(own(marked), marked, TURNS)


def test_a_template_is_known_by_its_text(own, tmp_path):
    def name(template, wanted=None):
        return load_chat_template(own(template), wanted, {}).name

    (tmp_path / "chat.jinja").write_text(PLAIN_CHATML)
    assert name((TEMPLATES / "qwen3.jinja").read_text()) == "qwen3, known to TRL"
    assert name(CHATML) == "the tokenizer's own, which marks what is generated"
    assert name(PLAIN_CHATML) == "the tokenizer's own"
    assert name({"default": CHATML, "tool_use": "x"}) == "the tokenizer's own, which marks what is generated"
    assert name(CHATML, "gemma") == "gemma of TRL"
    assert name(CHATML, str(tmp_path / "chat.jinja")) == f"file {tmp_path / 'chat.jinja'}"


@pytest.mark.parametrize("broken", ["{% if %}", "{{ messages", "{% generation %}x", "{{ messages | nofilter }}"])
def test_a_template_that_is_no_jinja_is_refused_with_its_name(tokenizer, own, tmp_path, broken):
    path = tmp_path / "broken.jinja"
    path.write_text(broken)
    with pytest.raises(ConfigError, match=rf"chat template \(file {re.escape(str(path))}\) is not valid Jinja: \w+"):
        load_chat_template(tokenizer, str(path), {})
    with pytest.raises(ConfigError, match=r"the tokenizer's own.* is not valid Jinja"):
        load_chat_template(own(broken), None, {})


def test_an_unknown_family_and_a_tokenizer_without_template_list_what_there_is(tokenizer):
    listed = ", ".join(families())
    with pytest.raises(ConfigError, match=f"chat_template qwen99 is neither a file nor a family.*{listed}"):
        load_chat_template(tokenizer, "qwen99", {})
    with pytest.raises(ConfigError, match=f"tokenizer has no chat template. Give --chat_template .*{listed}"):
        load_chat_template(tokenizer, None, {})


def test_a_template_that_marks_nothing_of_a_turn_cannot_tell_the_others_apart(own):
    """Of two turns the first is left out by the template: which one the only mark is, nobody knows."""
    template = load_chat_template(own(CHATML.replace("messages %}", "messages[2:] %}", 1)), None, {})
    turns = [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:4]]
    with pytest.raises(BadRow, match="marks 1 turns of the assistant, and there are 2"):
        template.render(conversation(turns, {}))
    assert texts(template.render(conversation(TURNS[:4], {}))) == ["Well.<|im_end|>\n"]
