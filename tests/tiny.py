"""A tokenizer and a model small enough for a test, made on the spot: real files, no network, the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

EOS = "<|endoftext|>"
PAD = "<|pad|>"
BOS = "<|begin|>"

SIZES: dict[str, Any] = {  # of a model of which only the arithmetic matters
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

# How Qwen divides text before it merges: blank lines stay together, a word takes the space before it.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Blank lines and double spaces occur often, so that they become tokens that can span a prompt's end.
TEXT = (
    "### Instruction:\nWrite the sum of two numbers.\n### Input:\n12 and 30\n### Response:\nThe sum is 42.\n\n"
    "Question: what is the capital of France?\n\n  Answer:  the capital of France is Paris.\n\n\n"
    "def add(a, b):\n    return a + b\n\n\nCafé, naïve, 東京, 🙂.\n"
)


def tiny_tokenizer(
    folder: str | Path,
    text: str | Sequence[str] = TEXT,
    *,
    vocab_size: int = 400,
    pieces: bool = True,
    trim_offsets: bool = False,
    adds_bos: bool = False,
    adds_eos: bool = False,
    eos: str | None = EOS,
    pad: str | None = PAD,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `text` and save it in `folder`.

    Without `pieces` a token may span words; with `adds_bos` or `adds_eos` the tokenizer itself puts these tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    divide = [pre_tokenizers.Split(Regex(PIECES), "isolated")] if pieces else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*divide, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (eos, pad, BOS if adds_bos else None) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] if isinstance(text, str) else text, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos or adds_eos:
        around = [*([BOS] if adds_bos else []), "$A", *([EOS] if adds_eos else [])]
        ids = [(token, tokenizer.token_to_id(token)) for token in around if token != "$A"]
        steps.append(processors.TemplateProcessing(single=around, special_tokens=ids))
    tokenizer.post_processor = processors.Sequence(steps)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, bos_token=BOS if adds_bos else None
    )
    wrapped.save_pretrained(str(folder))
    return wrapped


def tiny_model(folder: str | Path, *, seed: int = 0, text: str | Sequence[str] = TEXT, **overrides: Any) -> str:
    """Write a random Qwen3 of two layers and its tokenizer into `folder`; `overrides` go to its config."""
    tokenizer = tiny_tokenizer(folder, text)
    config = Qwen3Config(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "dtype": "float32",
            **overrides,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(str(folder))
    return str(folder)
