import pickle
from copy import copy
from functools import cache
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from manta.data.tokenize import IGNORE, Encoder, Sample, fit, load_tokenizer, tokenizer_digest
from manta.errors import UserError
from tiny import BOS, EOS, PAD, TEXT, tiny_tokenizer

KINDS = {
    "plain": {},
    "tokens span words": {"pieces": False, "vocab_size": 500},
    "trims offsets": {"trim_offsets": True},
    "tokens span words, trims": {"pieces": False, "vocab_size": 500, "trim_offsets": True},
    "begins with BOS": {"adds_bos": True},
    "appends EOS": {"adds_eos": True},
    "BOS and EOS, trims": {"adds_bos": True, "adds_eos": True, "trim_offsets": True},
}

# Whitespace meets whitespace at the boundary far more often here than in text at large; that is where tokens merge.
spaced = st.text(st.sampled_from(" \n\t\r\xa0.aé東🙂"), max_size=12)
words = st.text(max_size=30)
prompts = spaced | words | st.builds("{}{}".format, words, spaced)
answers = prompts.filter(lambda text: text != "")


@cache
def tokenizer_of(kind):
    with TemporaryDirectory() as folder:
        tiny_tokenizer(folder, **KINDS[kind])
        return load_tokenizer(folder)


@cache
def encoder(kind):
    return Encoder(tokenizer_of(kind))


def encode(kind, prompt, answer):
    (sample,) = encoder(kind)([prompt], [answer])
    return sample


def divide(sample):
    """(masked ids, trained ids); fails unless the masked ones are a prefix and every label is its token."""
    masked = next((i for i, label in enumerate(sample.labels) if label != IGNORE), len(sample.labels))
    assert sample.labels == [IGNORE] * masked + sample.input_ids[masked:]
    return sample.input_ids[:masked], sample.input_ids[masked:]


def decode(kind, ids):
    return tokenizer_of(kind).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(prompt=prompts, answer=answers)
@example(prompt="", answer="x")
@example(prompt="Question:\n", answer="\nAnswer")
@example(prompt="Q: ", answer=" two")
@example(prompt="Q:", answer="  two")
@example(prompt="Q: ", answer="  two")
@example(prompt="?\n", answer="  Answer")
@example(prompt="return ", answer="the")
@example(prompt="caf", answer="é")
def test_the_output_and_one_eos_are_trained_and_the_prompt_is_masked(kind, prompt, answer):
    masked, trained = divide(encode(kind, prompt, answer))
    assert decode(kind, trained) == answer + EOS
    assert decode(kind, masked) == (BOS if "BOS" in kind else "") + prompt
    assert (masked + trained).count(encoder(kind).eos) == 1


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(prompt=prompts, answer=answers)
def test_the_mask_covers_what_the_model_is_served(kind, prompt, answer):
    """At serving, the prompt is tokenized alone: the masked tokens are those, or merge nothing across the boundary."""
    sample = encode(kind, prompt, answer)
    if sample.merged_boundary:
        served = tokenizer_of(kind)(prompt)["input_ids"]
        assert divide(sample)[0] == [token for token in served if token != encoder(kind).eos]


@pytest.mark.parametrize("kind", ["plain", "trims offsets", "BOS and EOS, trims"])
@pytest.mark.parametrize(
    ("prompt", "answer"), [("of France?\n", "\nParis"), ("Answer: ", " Paris."), ("Answer:", "  Paris.")]
)
def test_whitespace_that_would_merge_across_the_boundary_is_divided(kind, prompt, answer):
    tokenizer = tokenizer_of(kind)
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    sample = encode(kind, prompt, answer)
    assert decode(kind, divide(sample)[1]) == answer + EOS
    assert sample.merged_boundary == (whole[: len(alone)] != alone)


def test_a_merged_boundary_is_reported_and_a_clean_one_is_not():
    assert encode("plain", "of France?\n", "\nParis").merged_boundary
    assert not encode("plain", "Response:\n", "The sum").merged_boundary


def test_a_word_that_goes_on_across_the_boundary_is_divided():
    tokenizer = tokenizer_of("plain")
    assert len(tokenizer(" capital")["input_ids"]) == 1
    sample = encode("plain", "the cap", "ital")
    assert sample.merged_boundary
    assert decode("plain", divide(sample)[1]) == "ital" + EOS


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(prompt=prompts, answer=answers)
@example(prompt="caf", answer="é")
@example(prompt="Ask.<|endoftext|>\n", answer="the answer<|endoftext|>")
def test_labels_by_what_tokens_spell_are_those_by_their_offsets(kind, prompt, answer):
    by_offsets = copy(encoder(kind))
    assert by_offsets.spelling
    by_offsets.spelling = None
    assert encode(kind, prompt, answer) == by_offsets([prompt], [answer])[0]


def test_an_encoder_travels_without_transformers():
    received = pickle.loads(pickle.dumps(encoder("appends EOS")))
    assert received(["of France?\n"], ["\nParis"]) == encoder("appends EOS")(["of France?\n"], ["\nParis"])
    assert b"transformers" not in pickle.dumps(encoder("plain"))


def test_spans_hold_the_spaces_of_their_tokens_whatever_the_tokenizer_trims():
    prompt = "Answer: the"
    for kind in ("plain", "trims offsets"):
        spans = encoder(kind).backend.encode(prompt).offsets
        assert "".join(prompt[start:end] for start, end in spans) == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_an_eos_written_in_the_output_is_not_doubled(kind):
    sample = encode(kind, "Response:\n", "The sum is 42." + EOS)
    assert sample.input_ids.count(encoder(kind).eos) == 1
    assert sample.labels[-1] == encoder(kind).eos


def test_a_batch_gives_what_each_pair_gives_alone():
    pairs = [("a", "b"), ("", "東京 🙂"), ("of France?\n", "\nParis"), ("x " * 50, "y")]
    together = encoder("plain")(*zip(*pairs, strict=True))
    assert together == [encode("plain", *pair) for pair in pairs]


def test_no_pairs_give_no_samples():
    assert encoder("plain")([], []) == []


def test_an_output_of_unlike_number_is_refused():
    with pytest.raises(ValueError, match="zip"):
        encoder("plain")(["a", "b"], ["c"])


def sample_of(prompt_tokens, answer_tokens):
    ids = list(range(10, 10 + prompt_tokens + answer_tokens))
    return Sample(ids, [IGNORE] * prompt_tokens + ids[prompt_tokens:])


def test_a_sample_that_fits_stays_as_it_is():
    whole = sample_of(3, 5)
    for policy in ("truncate", "drop", "error"):
        assert fit(whole, 8, policy) == [whole]


def test_truncation_keeps_the_beginning_and_says_so():
    whole = sample_of(3, 5)
    assert fit(whole, 6, "truncate") == [Sample(whole.input_ids[:6], whole.labels[:6], truncated=True)]


def test_dropping_leaves_nothing():
    assert fit(sample_of(3, 5), 7, "drop") == []


def test_the_error_policy_names_both_lengths_and_what_to_type():
    with pytest.raises(UserError, match=r"8 tokens, over max_seq_length 7.*--max_seq_length.*--overlong_policy"):
        fit(sample_of(3, 5), 7, "error")


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(length=st.integers(1, 60), limit=st.integers(2, 20), policy=st.sampled_from(["truncate", "drop", "error"]))
def test_splitting_loses_no_token_under_any_policy(length, limit, policy):
    whole = sample_of(0, length)
    pieces = fit(whole, limit, policy, split=True)
    assert [token for piece in pieces for token in piece.input_ids] == whole.input_ids
    assert [label for piece in pieces for label in piece.labels] == whole.labels
    assert all(len(piece.input_ids) == limit for piece in pieces[:-1])


def test_a_prompt_that_fills_the_limit_trains_nothing():
    (cut,) = fit(sample_of(6, 2), 6, "truncate")
    assert not cut.trains
    (cut,) = fit(sample_of(6, 2), 7, "truncate")
    assert cut.trains


def test_a_lone_first_token_trains_nothing():
    """No position comes before it, so that nothing predicts it."""
    assert not sample_of(0, 1).trains


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tiny_tokenizer(tmp_path, eos=None)
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path):
    tiny_tokenizer(tmp_path / "without", pad=None)
    assert load_tokenizer(str(tmp_path / "without")).pad_token == EOS
    tiny_tokenizer(tmp_path / "with")
    assert load_tokenizer(str(tmp_path / "with")).pad_token == PAD


def test_a_folder_without_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))


def test_the_digest_follows_what_a_tokenizer_does(tmp_path):
    variants = [{}, {"vocab_size": 300}, {"text": TEXT.upper()}, {"adds_bos": True}, {"trim_offsets": True}]
    digests = []
    for number, variant in enumerate(variants):
        folder = tmp_path / str(number)
        tiny_tokenizer(folder, **variant)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        digests.append(tokenizer_digest(tokenizer))
        assert tokenizer_digest(AutoTokenizer.from_pretrained(folder)) == digests[-1]
    tokenizer.chat_template = "{{ messages }}"
    digests.append(tokenizer_digest(tokenizer))
    assert len(set(digests)) == len(digests)
