"""The whole job on an embedded default: nothing is downloaded, everything is made and trained on the spot.

The task is to write numbers in digits. A small base model first reads sentences about numbers (continual pre-training
of every weight), which teaches it what they are but not how to answer; LoRA then teaches the answers.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from manta import cluster
from manta.config import Config, HFDatasetConfig
from manta.convert import convert
from manta.evaluate import Sampling, evaluate, print_table
from manta.manifest import write_text
from manta.report import print_summary
from manta.runs import Run
from manta.train import train

EOS, PAD = "<|endoftext|>", "<|pad|>"
_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SENTENCES = (
    "The number {words} is written {digits}.",
    "In digits, {words} is {digits}.",
    "{digits} is read as {words}.",
    "We counted {words} birds, that is {digits}, and then one more.",
)
_QUESTION = "Question: write {words} in digits.\nAnswer: "


def in_words(number: int) -> str:
    """English words for 0 … 999: 742 → seven hundred forty-two."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_UNITS[unit]}" if unit else "")
    hundreds, rest = divmod(number, 100)
    return f"{_UNITS[hundreds]} hundred" + (f" {in_words(rest)}" if rest else "")


def run_demo(folder: Path, num_workers: int = 2) -> dict[str, Any]:
    """Make, pre-train, fine-tune, merge and compare under `folder`; returns what `evaluate` does."""
    console = Console(highlight=False, stderr=True)
    start = time.time()
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    corpus, questions = write_data(folder)
    blank = write_blank_model(folder / "blank", corpus)
    shared: dict[str, Any] = {
        "results_dir": str(folder / "results"),
        "data_dir": str(folder / "prepared"),
        "device": "cpu",
        "num_workers": num_workers,
        "max_seq_length": 64,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "none",
        "sharding_strategy": "FULL_SHARD",
        "logging_steps": 5,
        "eval_steps": 25,
        "save_steps": 50,
    }
    pretraining = Config(
        hf_model_id=blank,
        objective="cpt",
        full_ft=True,
        run_name="pretrain",
        max_steps=150,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        learning_rate=3e-3,
        hf_dataset_config=HFDatasetConfig(dataset_name=str(corpus), output_template="{text}"),
        **shared,
    )
    with cluster.begun(pretraining) as ahead, cluster.connected(pretraining, ahead):
        train(pretraining, console, title="1/2 pre-train")
        base = convert(Run(folder / "results" / "pretrain"), folder / "base")
        tuning = Config(
            hf_model_id=str(base),
            run_name="tune",
            max_steps=300,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            learning_rate=5e-3,
            lora_target_modules="all-linear",
            early_stopping_patience=1,
            early_stopping_threshold=0.01,
            hf_dataset_config=HFDatasetConfig(
                dataset_name=str(questions),
                train_split_ratio=0.8,
                input_template="{question}",
                output_template="{answer}",
            ),
            **shared,
        )
        result = train(tuning, console, title="2/2 LoRA")
        tuned = Run(folder / "results" / "tune")
        merged = convert(tuned)
        report = evaluate(tuned, sampling=Sampling(max_tokens=8, temperature=0), console=console)
    out = Console(highlight=False)
    print_summary(result, out)
    print_table(report, out)
    page = tuned.path / "evaluation" / "report.html"
    out.print(f"Page:         {page}", markup=False, soft_wrap=True)
    out.print(f"Merged model: {merged}\nThe demo took {time.time() - start:.0f} s.", markup=False, soft_wrap=True)
    return report


def write_data(folder: Path) -> tuple[Path, Path]:
    """A corpus of sentences and a set of questions with answers, the same on every machine."""
    draw = random.Random(0)
    sentences, questions = [], []
    for number in range(1000):
        words, digits = in_words(number), str(number)
        sentences += [{"text": each.format(words=words, digits=digits)} for each in _SENTENCES]
        questions.append({"question": _QUESTION.format(words=words), "answer": digits})
    draw.shuffle(sentences)
    paths = folder / "corpus.jsonl", folder / "questions.jsonl"
    for path, rows in zip(paths, (sentences, questions), strict=True):
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return paths


def write_blank_model(folder: Path, corpus: Path) -> str:
    """An untrained Qwen3 of three million parameters, with a tokenizer trained on `corpus`; returns its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    if (folder / "config.json").exists():
        return str(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in corpus.open(encoding="utf-8")), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(wrapped),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=wrapped.eos_token_id,
            pad_token_id=wrapped.pad_token_id,
        )
    )
    wrapped.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)
