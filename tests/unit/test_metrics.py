"""Figures of answers: what counts as equal, scripts other than Latin, empty answers, and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from manta import metrics
from manta.errors import UserError
from manta.metrics import GSM8K, AnswerRule

GOLD = "She sold 48 / 2 = 24 clips in May.\n#### 72"


@pytest.mark.parametrize(
    ("given", "equal"),
    [
        ("so\n#### 72", True),
        ("#### 72.0", True),
        ("#### $72", True),
        ("#### 72.", True),
        ("#### 7,2", True),
        ("#### 73", False),
        ("the answer is 72", False),
        ("#### 72\nQuestion: again\n#### 5", True),
        ("", False),
    ],
)
def test_gsm8k_answers_are_compared_as_numbers(given, equal):
    compare = metrics.rule("auto", "auto", [GOLD])
    assert compare == AnswerRule(GSM8K, "number")
    assert metrics.rows([given], [GOLD], compare)["exact_match"].tolist() == [float(equal)]


def test_an_output_without_an_answer_is_no_answer():
    compare = metrics.rule("gsm8k", "auto", [GOLD])
    found = metrics.rows(["72", "#### 72"], [GOLD, GOLD], compare)
    assert found["answered"].tolist() == [0.0, 1.0]
    assert found["exact_match"].tolist() == [0.0, 1.0]


def test_without_a_pattern_the_whole_output_counts():
    compare = metrics.rule("auto", "auto", ["Paris.", "Rome"])
    assert compare.pattern is None
    assert metrics.rows([" Paris.\n", "rome"], ["Paris.", "Rome"], compare)["exact_match"].tolist() == [1.0, 0.0]
    loose = metrics.rule("all", "words", ["Paris."])
    assert metrics.rows(["the PARIS"], ["Paris."], loose)["exact_match"].tolist() == [1.0]


@pytest.mark.parametrize(("pattern", "what"), [("(", "regular expression"), ("x", "no group"), ("x(.)", "2 of 2")])
def test_a_pattern_that_cannot_work_is_a_message(pattern, what):
    with pytest.raises(UserError, match=what):
        metrics.rule(pattern, "auto", ["a", "b"])


def test_rouge_sees_every_script():
    compare = AnswerRule()
    found = metrics.rows(["Привет, мир", "東京は晴れ", "café"], ["привет мир", "東京は雨", "cafe"], compare)
    assert found["rouge1"][0] == 1.0
    assert 0.5 < found["rouge1"][1] < 1.0
    assert found["rouge1"][2] == 0.0


def test_rouge_is_rouge_scores_own_on_english():
    from rouge_score.rouge_scorer import RougeScorer

    ours = metrics.rows(["the cat sat on a mat"], ["a cat is on the mat today"], AnswerRule())
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score("a cat is on the mat today", "the cat sat on a mat")
    assert {name: ours[name][0] for name in theirs} == pytest.approx({name: t.fmeasure for name, t in theirs.items()})


def test_empty_answers_score_nothing_and_stop_nothing():
    found = metrics.rows(["", " "], ["something", "else"], AnswerRule())
    assert all(values.sum() == 0 for values in found.values())
    whole = metrics.corpus(["", ""], ["something", "else"])
    assert whole["bleu"]["value"] == whole["chrf"]["value"] == 0


def test_bleu_and_chrf_are_sacrebleus():
    import sacrebleu

    answers, references = ["a small test of it", "and one more line"], ["a small test of this", "and one line more"]
    found = metrics.corpus(answers, references)
    assert found["bleu"]["value"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert found["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert "version:" in found["bleu"]["signature"]
    low, high = found["chrf"]["interval"]
    assert low < found["chrf"]["value"] < high


def test_an_answer_of_one_word_has_a_bleu():
    assert metrics.corpus(["42", "7"], ["42", "8"])["bleu"]["value"] > 40


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = metrics.interval(draw.normal(0.3, 1.0, 40), seed=trial)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99  # 95 %, less what the bootstrap lacks at 40 rows, within the trials' noise
    assert metrics.interval(np.array([1.0])) is None


def test_a_weighted_interval_is_that_of_the_weighted_mean():
    values, weights = np.array([0.0, 1.0, 5.0]), np.array([1.0, 0.0, 0.0])
    low, high = metrics.interval(values, weights)
    assert low == high == 0.0
