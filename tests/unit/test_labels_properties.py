"""What is trained, over random texts, templates, tokenizers and limits: exactly the answer, and no row unaccounted."""

import json
import unicodedata
from functools import cache
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenize import KINDS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from manta.config import Config
from manta.data import formats, prepare
from manta.data.chat import load_chat_template
from manta.data.tokenize import IGNORE, Encoder, fit
from manta.dataset_config import HFDatasetConfig
from tiny import BOS, EOS, PAD, TEXT, tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<end_of_turn>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# A special token ends what is trained, and text follows it.
BARE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
)
ENDS = {CHATML: "<|im_end|>\n", GEMMA: "<end_of_turn>\n", BARE: "<|im_end|>"}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]

# How the tokenizers of Llama 2, Mistral and Gemma put spaces: before every text, before the first, before none.
SENTENCE_PIECE = {
    "a space before every text": lambda: normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    ),
    "a space before the first": lambda: pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    "no space before": lambda: normalizers.Replace(" ", "▁"),
}
PLAIN = [*KINDS, "composes characters"]
EVERY = [*PLAIN, *SENTENCE_PIECE]

odd = st.sampled_from(
    [" ", "\n", "\t", "é", "e\u0301", "👩‍👩‍👧", "🇫🇷", "שלום", "مرحبا", "\u202e", "\u2028", "\0", "東", "a b", "\n\n"]
)
parts = st.sampled_from(
    ["the cap", "ital", "Answer:", "  Paris", "of France?\n", "\nThe sum", "The sum is ", "42.\n\n"]
)
text = st.lists(odd | parts | st.text(max_size=6), max_size=6).map("".join)
LIMITS = st.integers(2, 40)
sometimes = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def sentence_piece(spaces):
    """BPE over characters with ▁ for a space, and bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    puts = spaces()
    if isinstance(puts, pre_tokenizers.PreTokenizer):
        tokenizer.pre_tokenizer = puts
    else:
        tokenizer.normalizer = puts
    strip = [] if isinstance(puts, normalizers.Replace) else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = ["<unk>", EOS, PAD, BOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=600, special_tokens=special[:4]))
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(special[4:])}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    bos = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=[BOS, "$A"], special_tokens=bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, bos_token=BOS, unk_token="<unk>"
    )


@cache
def tokenizer(kind, special=False):
    if kind in SENTENCE_PIECE:
        made = sentence_piece(SENTENCE_PIECE[kind])
    else:
        with TemporaryDirectory() as folder:
            made = tiny_tokenizer(folder, **KINDS.get(kind, {}))
        if kind not in KINDS:
            made.backend_tokenizer.normalizer = normalizers.NFC()
    if special:
        made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


@cache
def encoder(kind, special=False):
    return Encoder(tokenizer(kind, special))


def decode(made, ids):
    return made.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def composed(kind, told):
    return unicodedata.normalize("NFC", told) if kind == "composes characters" else told


@st.composite
def templates(draw, fields):
    """(a template over 1 to 3 of the fields, what it means for a row), with text that no template language touches."""
    used = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3))
    around = [draw(text).replace("\\", "/") for _ in range(len(used) + 1)]
    pieces = [around[0]]
    for name, after in zip(used, around[1:], strict=True):
        pieces += [f"{{{name}}}", after]
    escaped = "".join(p if i % 2 else p.replace("{", "{{").replace("}", "}}") for i, p in enumerate(pieces))
    return escaped, lambda row: "".join(row[used[i // 2]] if i % 2 else piece for i, piece in enumerate(pieces))


@st.composite
def rows_of_templates(draw):
    """(config, row, its prompt, its answer)."""
    asked, prompt = draw(templates(["a", "b", "c"]) | st.just(("", lambda row: "")))
    answered, answer = draw(templates(["d", "e"]) | st.just(("{d}", lambda row: row["d"])))
    row = {name: draw(text) for name in "abcde"}
    config = HFDatasetConfig(input_template=asked, output_template=answered)
    return config, row, prompt(row), answer(row)


def check_spaces(made, sample, prompt, answer):
    """A space that SentencePiece puts in front is in front of the whole, and of no part of it."""
    asked, whole = made("?")["input_ids"], made(prompt + answer)["input_ids"]
    assert decode(made, sample.input_ids) == decode(made, whole) + EOS
    assert decode(made, whole) in (BOS + prompt + answer, BOS + " " + prompt + answer)
    trained = [label for label in sample.labels if label != IGNORE]
    heard = decode(made, asked + trained).removeprefix(decode(made, asked))
    assert heard in (answer + EOS, answer + EOS if prompt else f" {answer}{EOS}")


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
@pytest.mark.parametrize(
    ("prompt", "answer"), [("### Response:\n", "The sum is 42."), ("of France?\n", "\nParis"), ("Answer:", " the sum")]
)
def test_parts_that_are_tokenized_apart_get_no_space_in_front(kind, prompt, answer):
    (sample,) = encoder(kind)([prompt], [answer])
    assert sample.merged_boundary
    check_spaces(tokenizer(kind), sample, prompt, answer)


def test_a_tokenizer_that_drops_control_characters_loses_nothing_of_an_answer():
    drops = [normalizers.Prepend("▁"), normalizers.Replace("\0", ""), normalizers.Replace(" ", "▁")]
    made = sentence_piece(lambda: normalizers.Sequence(drops))
    (sample,) = Encoder(made)(["###"], [" Instr"])
    assert sample.merged_boundary
    assert decode(made, [label for label in sample.labels if label != IGNORE]) == " Instr" + EOS


@pytest.mark.parametrize("kind", EVERY)
@sometimes
@given(drawn=rows_of_templates().filter(lambda drawn: drawn[3].strip()), limit=LIMITS)
def test_the_trained_tokens_are_the_output_and_eos_or_a_beginning_of_it(kind, drawn, limit):
    config, row, prompt, answer = drawn
    made = tokenizer(kind)
    assert formats.render(config, row, "sft") == (prompt, answer)
    (sample,) = encoder(kind)([prompt], [answer])
    trained = [label for label in sample.labels if label != IGNORE]
    masked = sample.input_ids[: len(sample.labels) - len(trained)]
    assert sample.labels == [IGNORE] * len(masked) + trained
    assert sample.input_ids == masked + trained

    if kind in SENTENCE_PIECE:
        check_spaces(made, sample, prompt, answer)
    else:
        assert decode(made, trained) == composed(kind, answer) + EOS
        assert decode(made, masked) == (BOS if "BOS" in kind else "") + composed(kind, prompt)

    (cut,) = fit(sample, limit, "truncate")
    assert cut.truncated == (len(sample.input_ids) > limit)
    assert cut.input_ids == sample.input_ids[:limit]
    kept = [label for label in cut.labels if label != IGNORE]
    assert kept == trained[: max(0, limit - len(masked))]
    assert decode(made, trained).startswith(decode(made, kept).rstrip("\ufffd"))  # a character may be cut in two
    assert cut.trains == bool(kept and (masked or len(kept) > 1))


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("template", ENDS, ids=["ChatML", "Gemma", "bare"])
@pytest.mark.parametrize("special", [False, True], ids=["tokens of text", "special tokens"])
@settings(sometimes, max_examples=25)
@given(contents=st.lists(text.filter(str.strip), min_size=2, max_size=6), system=st.none() | text)
def test_the_trained_tokens_are_the_marked_turns_in_order(kind, template, special, contents, system):
    roles = ["user", "assistant"] * 3
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": role, "content": said} for role, said in zip(roles, contents, strict=False)]
    talk = formats.conversation([*first, *turns], {})
    made = tokenizer(kind, special)
    made.chat_template = template
    rendered = load_chat_template(made, None, {"bos_token": BOS}).render(talk)
    (sample,) = encoder(kind, special).encode([rendered])

    answers = [said for role, said in zip(roles, contents, strict=False) if role == "assistant"]
    expected = "".join((said.strip() if template == GEMMA else said) + ENDS[template] for said in answers)
    spoken = [rendered.text[start:end] for start, end in rendered.trained]
    assert "".join(spoken) == expected
    assert len(spoken) == len(answers)
    assert all(label in (IGNORE, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))
    trained = [label for label in sample.labels if label != IGNORE]
    whole = made(rendered.text, add_special_tokens=False)["input_ids"]
    assert decode(made, sample.input_ids) == decode(made, whole)
    if kind not in SENTENCE_PIECE:
        assert composed(kind, decode(made, sample.input_ids)) == composed(kind, rendered.text)
        assert composed(kind, decode(made, trained)) == composed(kind, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    tiny_tokenizer(root / "model", eos="<|im_end|>")
    (root / "chatml.jinja").write_text(CHATML)
    return root


GOOD = {"a": "Where?", "d": "There."}
TALK = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]}
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "robot"]), "content": text})
broken = st.sampled_from(["", "  ", "{", "[]", "3", "null", '{"a": "\\ud800"}', '"text"', '{"d": '])
pairs = st.fixed_dictionaries({}, optional={"a": text | st.just("long " * 40), "d": text | st.none() | st.integers()})
talks = st.fixed_dictionaries({"messages": st.lists(message, max_size=4) | st.none() | text})


@pytest.mark.parametrize(("good", "rows"), [(GOOD, pairs), (TALK, talks)], ids=["pairs", "conversations"])
@sometimes
@given(data=st.data(), limit=st.integers(60, 110), policy=st.sampled_from(["truncate", "drop"]), cpt=st.booleans())
def test_every_row_is_kept_or_counted_or_put_aside_and_what_is_kept_trains(
    folder, good, rows, data, limit, policy, cpt
):
    drawn = data.draw(st.lists(rows.map(json.dumps) | broken, max_size=9))
    lines = [json.dumps(good), *drawn]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    templates = {"input_template": "Q: {a}\n", "output_template": "{d}"} if good is GOOD else {}
    config = Config.from_dict(
        {
            "hf_model_id": str(folder / "model"),
            "data_dir": str(folder / "data"),
            "chat_template": str(folder / "chatml.jinja"),
            "objective": "cpt" if cpt and good is GOOD else "sft",
            "max_seq_length": limit,
            "overlong_policy": policy,
            "bad_rows_limit": 1.0,
            "hf_dataset_config": {"dataset_name": str(path), "train_split_ratio": 1.0, **templates},
        }
    )
    prepared, parts = prepare.locate(config)
    prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
    counts, samples = prepared.counts, prepared.tokenized("training")

    kept = set(samples["row"])
    left = [
        row
        for why in ("blank_line", "empty_output", "overlong_dropped", "no_trained_token")
        for row in counts["noted"].get(why, {"first": []})["first"]
    ]
    aside = [json.loads(line)["row"] for line in (prepared.path / prepare.QUARANTINE).read_text().split("\n")[:-1]]
    assert sorted([*kept, *left, *aside]) == list(range(len(lines)))
    assert counts["quarantined"] == len(aside)
    assert len(samples) == counts["training"]["samples"] >= len(kept)
    for labels in samples["labels"]:
        assert any(label != IGNORE for label in labels[1:])
        assert len(labels) <= limit
