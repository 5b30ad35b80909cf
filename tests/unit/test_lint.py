"""Each finding on a small dataset that has it and on one that has not, prepared as `manta train` prepares."""

import io
import json

import pytest
from rich.console import Console

from manta.config import Config
from manta.data import lint, prepare
from manta.dataset_config import LintConfig
from manta.errors import ConfigError, UserError
from manta.preparation import check_data
from tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CITIES = ["Paris", "Tokyo", "Rome", "Madrid", "Cairo", "Lima", "Oslo", "Quito", "Accra", "Delhi", "Baku", "Riga"]
PAIRS = [{"q": f"Where is {city}?", "a": f"{city} is there."} for city in CITIES]
LONG = "the capital of France " * 20
TOOL = {"type": "function", "function": {"name": "locate", "parameters": {"type": "object", "properties": {}}}}
DEFAULTS = LintConfig()


def turns(*texts):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


TALKS = [turns(f"Where is {city}?", f"{city} is there.") for city in CITIES]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tokenizers: whose EOS is another token than ChatML's end of turn, with and without that one ending generation."""
    root = tmp_path_factory.mktemp("models")
    for name in ("other", "listed"):
        tokenizer = tiny_tokenizer(root / name)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.save_pretrained(root / name)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    (root / "listed" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tiny_tokenizer(root / "same", eos="<|im_end|>")
    (root / "chatml.jinja").write_text(CHATML)
    return root


@pytest.fixture
def make(models, tmp_path):
    """Rows → (config, prepared data); conversations by ChatML unless another `chat_template` is given."""

    def made(rows, data=None, model="same", **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        templates = {"input_template": "Question: {q}\n", "output_template": "{a}"} if "q" in rows[0] else {}
        config = Config.from_dict(
            {
                "hf_model_id": str(models / model),
                "data_dir": str(tmp_path / "prepared"),
                "chat_template": str(models / "chatml.jinja"),
                **settings,
                "hf_dataset_config": {"dataset_name": str(path), "train_split_ratio": 1.0, **templates, **(data or {})},
            }
        )
        prepared, parts = prepare.locate(config)
        prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
        return config, prepared

    return made


def found(made, **levels):
    """name → finding of prepared data, under lint levels."""
    config, prepared = made
    every = lint.findings(prepared.counts, config.lint.model_copy(update=levels), config.objective)
    assert len({finding.name for finding in every}) == len(every)
    return {finding.name: finding for finding in every}


def test_clean_pairs_and_clean_conversations_have_no_finding(make):
    assert found(make(PAIRS)) == {}
    assert found(make(TALKS)) == {}
    assert found(make(TALKS, chat_template="qwen2_5")) == {}


def test_rows_of_which_nothing_would_be_trained(make):
    rows = [*PAIRS[:3], {"q": "x", "a": " \n"}, {"q": LONG, "a": "Paris."}, PAIRS[4], {"q": "y", "a": None}]
    made = make(rows, max_seq_length=80)
    finding = found(made)["no_trained_token"]
    assert (finding.level, finding.rows, finding.first) == ("warning", 3, (3, 4, 6))
    assert made[1].counts["training"]["samples"] == 4
    assert list(found(make(rows, max_seq_length=2048))) == ["no_trained_token"]
    assert found(make(rows, max_seq_length=2048))["no_trained_token"].first == (3, 6)
    assert "no_trained_token" not in found(make([*rows[:3], rows[4]]))


def test_an_answer_that_does_not_end_in_a_stop_token(make):
    finding = found(make(TALKS, model="other"))["stop_not_trained"]
    assert (finding.level, finding.rows, finding.first) == ("error", 12, tuple(range(10)))
    assert finding.detail == "it ends in 'Paris is there.<|im_end|>', and generation ends at <|endoftext|>"
    assert found(make(TALKS, model="listed")) == {}
    assert found(make(TALKS, model="same")) == {}
    assert found(make(PAIRS, model="other")) == {}


def test_a_token_that_would_span_prompt_and_answer(make):
    rows = [*PAIRS[:5], {"q": "Where?", "a": "\nParis."}, PAIRS[6], {"q": "Where?", "a": "\n\nRome."}]
    finding = found(make(rows))["boundary_split"]
    assert (finding.level, finding.rows, finding.first) == ("warning", 2, (5, 7))
    assert list(found(make(rows))) == ["boundary_split"]


def test_what_the_template_leaves_out(make):
    rows = [*TALKS[:2], {**TALKS[2], "tools": [TOOL]}, {**TALKS[3], "tools": [TOOL]}]
    finding = found(make(rows, chat_template="phi3"))["content_lost"]
    assert (finding.level, finding.rows, finding.first, finding.detail) == ("error", 2, (2, 3), "the tool locate")
    assert "content_lost" not in found(make(rows, chat_template="qwen2_5"))
    thoughts = [{"messages": [talk["messages"][0], {**talk["messages"][1], "thinking": "hm"}]} for talk in TALKS]
    assert found(make(thoughts, chat_template="qwen2_5"))["content_lost"].detail == "the reasoning of message 2"
    assert found(make(thoughts, chat_template="qwen3")) == {}


def test_a_prompt_that_is_not_what_is_served(make):
    rows = [*TALKS[:3], turns("Hi", "Hello!", "And?", "Well."), TALKS[4], turns("1", "2", "3", "4")]
    finding = found(make(rows, chat_template="qwen3"))["serving_differs"]
    assert (finding.level, finding.rows, finding.first) == ("error", 2, (3, 5))
    assert "the model is served 'Hello!<|im_end|>" in finding.detail
    assert "and trained on '<think>" in finding.detail
    assert found(make(rows, chat_template="qwen3", data={"train_on": "last"})) == {}
    assert found(make(rows, chat_template="qwen2_5")) == {}


def test_a_share_of_trained_tokens_that_no_good_template_gives(make):
    assert found(make(PAIRS, {"input_template": ""}))["trained_share"].detail == "100.00% of the training tokens"
    assert found(make(PAIRS, {"output_template": "{a}"}, objective="cpt")) == {}
    rows = [{"q": LONG * 3 + pair["q"], "a": "."} for pair in PAIRS]
    made = make(rows)
    counts = made[1].counts["training"]
    share = counts["trained_tokens"] / counts["tokens"]
    assert found(made, trained_share_below=share) == {}
    finding = found(made, trained_share_below=share * 1.01)["trained_share"]
    assert (finding.level, finding.rows, finding.first) == ("warning", 0, ())
    assert finding.detail == f"{share:.2%} of the training tokens"


@pytest.mark.parametrize("rows", [PAIRS, TALKS])
def test_equal_rows(make, rows):
    finding = found(make([*rows[:5], rows[1], rows[5], rows[0], rows[1]]))["duplicates"]
    assert (finding.level, finding.rows, finding.first) == ("warning", 3, (5, 7, 8))
    near = {"q": f"{PAIRS[0]['q']} ", "a": PAIRS[0]["a"]} if rows is PAIRS else turns("Where is Paris? ", "There.")
    assert found(make([*rows, near])) == {}


def test_text_that_is_equal_and_trained_otherwise_is_no_duplicate(make):
    rows = [*PAIRS[:3], {"q": "a", "a": "b\nc"}, {"q": "a\nb", "a": "c"}]
    assert "duplicates" not in found(make(rows))
    assert "duplicates" in found(make([*rows, rows[3]]))


def test_training_rows_that_other_splits_have_too(make):
    made = make(PAIRS * 2, {"train_split_ratio": 0.5})
    splits = {
        split: {json.loads(line)["row"] % 12 for line in made[1].text(split).read_text().splitlines()}
        for split in ("training", "validation", "test")
    }
    training = [json.loads(line)["row"] for line in made[1].text("training").read_text().splitlines()]
    shared = [row for row in training if row % 12 in splits["validation"] | splits["test"]]
    finding = found(made)["overlap"]
    assert shared
    assert (finding.level, finding.rows, finding.first) == ("warning", len(shared), tuple(sorted(shared)[:10]))
    assert found(make(PAIRS, {"train_split_ratio": 0.5})) == {}


def test_rows_that_are_cut(make):
    rows = [*PAIRS[:11], {"q": "Where?", "a": LONG}]
    made = make(rows, max_seq_length=80)
    finding = found(made)["truncated"]
    assert (finding.level, finding.rows, finding.first) == ("warning", 1, (11,))
    assert found(made, truncated_above=1 / 12) == {}
    assert list(found(made, truncated_above=0.083)) == ["truncated"]
    assert found(make(rows)) == {}
    assert found(make(rows, max_seq_length=80, overlong_policy="drop")) == {}


def everything(make):
    """Prepared data with a finding of five kinds, two of them errors."""
    rows = [turns("Hi", "Hello!", "And?", "Well."), turns("Hi", "Hello!", "And?", "Well."), turns("Hi", LONG)]
    return make([*rows, *TALKS[:2]], model="other", chat_template="qwen3", max_seq_length=80)


def test_errors_come_first_and_levels_decide(make):
    made = everything(make)
    assert [(name, finding.level) for name, finding in found(made).items()] == [
        ("stop_not_trained", "error"),
        ("serving_differs", "error"),
        ("duplicates", "warning"),
        ("truncated", "warning"),
    ]
    levels = {"stop_not_trained": "off", "serving_differs": "warning", "truncated": "error"}
    assert [(name, finding.level) for name, finding in found(made, **levels).items()] == [
        ("truncated", "error"),
        ("serving_differs", "warning"),
        ("duplicates", "warning"),
    ]
    assert found(made, **dict.fromkeys(lint.MEANING, "off")) == {}


def test_a_finding_says_its_rows_and_what_to_do(make):
    finding = found(everything(make))["duplicates"]
    assert str(finding) == (
        "duplicates: equal rows in the training split (1 row, the first: 1). "
        "Remove them, or give the dataset a weight; "
        '--lint \'{"duplicates": "off"}\' to accept it.'
    )
    for finding in found(everything(make)).values():
        assert all(part in str(finding) for part in (finding.name, finding.detail, *lint.MEANING[finding.name]))
        assert f"{finding.rows} row" in str(finding)
        assert str(list(finding.first)).strip("[]") in str(finding)


def test_a_finding_without_rows_names_none(make):
    text = str(found(make(PAIRS, {"input_template": ""}))["trained_share"])
    assert "row" not in text
    assert "100.00% of the training tokens" in text


def test_errors_stop_and_warnings_are_said(make):
    config, prepared = everything(make)
    console = Console(file=io.StringIO(), width=60)
    with pytest.raises(UserError) as caught:
        check_data(config, prepared, console)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["stop_not_trained", "serving_differs", "See it"]
    assert lines[-1] == f"See it: manta inspect --prepared {prepared.path}"
    said = console.file.getvalue().splitlines()
    assert [line.split(":")[:2] for line in said] == [["warning", " duplicates"], ["warning", " truncated"]]


def test_accepted_findings_stop_nothing(make):
    config, prepared = everything(make)
    accepted = config.model_copy(update={"lint": LintConfig(stop_not_trained="off", serving_differs="warning")})
    console = Console(file=io.StringIO())
    check_data(accepted, prepared, console)
    said = console.file.getvalue()
    assert "warning: serving_differs: " in said
    assert "stop_not_trained" not in said
    assert said.count("\n") == 3


def test_levels_make_no_other_data_and_no_other_run(make):
    config, prepared = make(PAIRS)
    for levels in ('{"duplicates": "error", "truncated_above": 0.5}', {"no_trained_token": "off"}):
        other = Config.from_dict({**config.to_dict(), "lint": levels})
        assert other.lint != config.lint
        assert prepare.locate(other)[0] == prepared
        assert prepare.is_ready(prepared)
        assert other.fingerprint() == config.fingerprint()
        assert config.differences(other) == []


def test_every_finding_has_a_level_and_a_wrong_one_is_a_message():
    assert {name for name in LintConfig.model_fields if not name.endswith(("_above", "_below"))} == set(lint.MEANING)
    errors = {name for name in lint.MEANING if getattr(DEFAULTS, name) == "error"}
    assert errors == {"stop_not_trained", "content_lost", "serving_differs"}
    for wrong in ({"duplicates": "fatal"}, {"duplicate": "off"}, {"truncated_above": 2}, "off", '"off"'):
        with pytest.raises(ConfigError, match=r"^lint"):
            Config.from_dict({"lint": wrong})


def test_rows_of_texts_and_of_messages_do_not_mix(make):
    """Which of them a dataset holds is told by its first rows; what is otherwise is put aside."""
    texts = [{"prompt": pair["q"], "completion": pair["a"]} for pair in PAIRS]
    talks = [{"prompt": talk["messages"][:1], "completion": talk["messages"][1:]} for talk in TALKS]
    for rows, kind in ((texts * 6 + talks[:1], "messages"), (talks * 6 + texts[:1], "text")):
        _, prepared = make(rows, bad_rows_limit=0.5)
        (bad,) = [json.loads(line) for line in (prepared.path / prepare.QUARANTINE).read_text().splitlines()]
        assert (bad["row"], bad["reason"]) == (72, f"it holds {kind}, unlike the first rows")
        assert prepared.counts["training"]["samples"] == 72
