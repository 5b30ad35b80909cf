"""Manta's ids and labels of conversations against those of transformers, over the families that TRL ships."""

import re
from datetime import datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from manta.data.chat import TODAY, families, load_chat_template
from manta.data.formats import conversation
from manta.data.lines import BadRow
from manta.data.tokenize import IGNORE, Encoder
from tiny import BOS, tiny_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
WANT_PARTS = {"idefics3", "llava_next", "smolvlm"}  # content is a list of texts and images to them
TEXT_FAMILIES = [family for family in families() if family not in WANT_PARTS]

MULTIPLY = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "One."}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": 3}}}
TALKS = {
    "a single turn": [
        {"role": "user", "content": "What is 2?"},
        {"role": "assistant", "content": "It is two."},
    ],
    "system and turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you."},
    ],
    "tools": [
        {"role": "user", "content": "2*3?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "multiply", "tool_call_id": "call00001", "content": "6"},
        {"role": "assistant", "content": "Six."},
    ],
    "reasoning": [
        {"role": "user", "content": "2*3?"},
        {"role": "assistant", "reasoning_content": "two times three", "content": "Six."},
    ],
    "unicode and spaces": [
        {"role": "user", "content": "  naïve 東京 🙂 \n"},
        {"role": "assistant", "content": " Café 👩‍👩‍👧 שלום a\u0308 ok "},
        {"role": "user", "content": "\té"},
        {"role": "assistant", "content": "  two  spaces\n\n and a line"},
    ],
}
# Where a token would span prompt and answer, the two are tokenized apart, and the ids are not those of the whole.
AT_THE_EDGE = [
    {"role": "user", "content": "Write a paragraph."},
    {"role": "assistant", "content": "\n\n  x\n"},
    {"role": "user", "content": " again "},
    {"role": "assistant", "content": "\n東京 🙂"},
]
ROLES = "Conversation roles must alternate user/assistant"
REFUSED = {
    ("gemma", "system and turns"): "System role not supported",
    **{(family, "tools"): ROLES for family in ("cohere", "cohere2", "gemma", "gemma3")},
}
SPECIAL = re.compile(r"<[|｜][^<>{}' ]+?[|｜]>|<(?:start|end)_of_turn>|<[a-z]+\|>|<\|[a-z]+>")


@cache
def tokenizer(kind):
    with TemporaryDirectory() as folder:
        made = tiny_tokenizer(folder, adds_bos=True, trim_offsets=kind == "trims offsets")
    if kind == "special tokens":
        texts = [(TEMPLATES / f"{family}.jinja").read_text() for family in families()]
        made.add_special_tokens(
            {"additional_special_tokens": sorted({t for text in texts for t in SPECIAL.findall(text)})}
        )
    return made


@cache
def encoder(kind):
    return Encoder(tokenizer(kind))


def talk_of(name):
    return conversation(TALKS[name], {"tools": [MULTIPLY]} if name == "tools" else {})


def encode(kind, family, talk):
    """(the family's template, the sample)."""
    template = load_chat_template(tokenizer(kind), family, {})
    (sample,) = encoder(kind).encode([template.render(talk)])
    return template, sample


def reference(kind, template, talk):
    return tokenizer(kind).apply_chat_template(
        talk.messages,
        tools=talk.tools,
        chat_template=template.marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )


def marked_text(kind, template, talk):
    """(the whole text, what the generation markers mark of it), as transformers itself renders them."""
    texts, marks = render_jinja_template(
        conversations=[talk.messages],
        tools=talk.tools,
        chat_template=template.marked,
        return_assistant_tokens_mask=True,
        **tokenizer(kind).special_tokens_map,
    )
    return texts[0], "".join(texts[0][start:end] for start, end in marks[0])


def decode(kind, ids):
    return tokenizer(kind).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained(sample):
    return [label for label in sample.labels if label != IGNORE]


def test_the_families_of_the_field_are_among_those_compared():
    assert {
        *("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "llama3", "gemma", "gemma3", "phi3", "phi3_5"),
        *("deepseekv3", "deepseek_r1_distill", "glm4moe", "gptoss", "cohere", "cohere2", "lfm2_v2"),
        *("nemotron_3_nano", "muse_glimmer", "diffusion_gemma"),
    } <= set(TEXT_FAMILIES)
    assert WANT_PARTS.isdisjoint(TEXT_FAMILIES)
    assert WANT_PARTS.issubset(families())


def test_the_special_tokens_of_the_families_are_single_tokens():
    for token in (
        "<|im_start|>",
        "<end_of_turn>",
        "<|eot_id|>",
        "<｜Assistant｜>",
        "<|END_OF_TURN_TOKEN|>",
        "<|call|>",
    ):
        assert len(tokenizer("special tokens").tokenize(token)) == 1
        assert len(tokenizer("begins with BOS").tokenize(token)) > 1


@pytest.mark.parametrize("kind", ["begins with BOS", "special tokens"])
@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_ids_and_trained_tokens_are_those_of_transformers(family, name, kind):
    talk = talk_of(name)
    if (family, name) in REFUSED:
        with pytest.raises(BadRow, match=REFUSED[family, name]):
            encode(kind, family, talk)
        return
    template, sample = encode(kind, family, talk)
    theirs = reference(kind, template, talk)
    assert sample.input_ids == theirs["input_ids"]
    assert [int(label != IGNORE) for label in sample.labels] == theirs["assistant_masks"]
    assert trained(sample) == [
        token for token, is_trained in zip(sample.input_ids, theirs["assistant_masks"], strict=True) if is_trained
    ]
    assert 0 < len(trained(sample)) < len(sample.input_ids)
    assert not sample.merged_boundary


@pytest.mark.parametrize("name", [*TALKS, "at the edge"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_tokenizer_that_trims_offsets_trains_the_marked_text(family, name):
    """As Llama 3's does. Where whitespace meets, ids may be those of the parts."""
    talk = conversation(AT_THE_EDGE, {}) if name == "at the edge" else talk_of(name)
    if (family, name) in REFUSED:
        with pytest.raises(BadRow, match=REFUSED[family, name]):
            encode("trims offsets", family, talk)
        return
    template, sample = encode("trims offsets", family, talk)
    text, marked = marked_text("trims offsets", template, talk)
    assert decode("trims offsets", sample.input_ids) == text
    assert decode("trims offsets", trained(sample)) == marked
    if not sample.merged_boundary:
        assert sample.input_ids == reference("trims offsets", template, talk)["input_ids"]


@pytest.mark.parametrize("kind", ["begins with BOS", "special tokens"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_whitespace_at_the_edge_of_an_answer_is_trained_where_the_template_marks_it(family, kind):
    talk = conversation(AT_THE_EDGE, {})
    template, sample = encode(kind, family, talk)
    text, marked = marked_text(kind, template, talk)
    assert decode(kind, sample.input_ids) == text
    assert decode(kind, trained(sample)) == marked
    assert sample.merged_boundary == (sample.input_ids != reference(kind, template, talk)["input_ids"])


@pytest.mark.parametrize("family", ["phi3", "lfm2_v2", "qwen3_instruct_2507"])
def test_an_answer_whose_first_newline_would_join_the_prompts_is_reported(family):
    assert encode("special tokens", family, conversation(AT_THE_EDGE, {}))[1].merged_boundary


def test_a_character_of_several_tokens_at_the_end_of_a_stretch_is_trained_whole():
    """The mask of transformers 5 ends at the first token of a stretch's last character: half of it is not trained."""
    talk = conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "שלום"}], {})
    template, sample = encode("begins with BOS", "diffusion_gemma", talk)
    theirs = reference("begins with BOS", template, talk)
    assert sample.input_ids == theirs["input_ids"]
    assert decode("begins with BOS", trained(sample)) == "שלום<turn|>\n"
    assert len(trained(sample)) == sum(theirs["assistant_masks"]) + 1


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_bos_stands_as_often_as_the_template_writes_it(family):
    template, sample = encode("begins with BOS", family, talk_of("a single turn"))
    written = template.render(talk_of("a single turn")).text.count(BOS)
    assert sample.input_ids.count(tokenizer("begins with BOS").bos_token_id) == written <= 1


def test_tool_arguments_are_given_as_each_template_reads_them():
    """DeepSeek V3's own joins them as text; its training variant, and all others, write the values as JSON."""
    talk = talk_of("tools")
    template = load_chat_template(tokenizer("begins with BOS"), "deepseekv3", {})
    for text in (template.render(talk).text, template.prompt(talk, 3)):
        assert '```json\n{"a": 2, "b": 3}\n```' in text


@pytest.mark.parametrize(
    ("wanted", "date"),
    [
        ("gptoss", "2024-07-26"),
        ("muse_glimmer", "2024-07-26"),
        (str(TEMPLATES / "llama3_1.jinja"), "26 Jul 2024"),
        (str(TEMPLATES / "llama3_2.jinja"), "26 Jul 2024"),
    ],
)
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(wanted, date):
    template = load_chat_template(tokenizer("begins with BOS"), wanted, {})
    first, second = (template.render(talk_of("a single turn")).text for _ in range(2))
    assert first == second
    assert date in first
    assert date in template.prompt(talk_of("a single turn"), 1)
    assert datetime.now().strftime("%Y-%m-%d") not in first
    assert TODAY.date() < datetime.now().date()


@pytest.mark.parametrize("family", sorted(WANT_PARTS))
def test_a_template_that_wants_content_in_parts_is_noticed(family):
    """Text is a list of characters to them: some fail on it, and some leave it out."""
    template = load_chat_template(tokenizer("begins with BOS"), family, {})
    talk = talk_of("a single turn")
    try:
        rendered = template.render(talk)
    except BadRow as reason:
        assert "the chat template refuses it: 'str object' has no attribute 'text'" in str(reason)
    else:
        assert template.lost(talk, rendered) == "the content of message 2"
