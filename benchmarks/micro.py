"""The levers one by one, as ratios of two arms measured in turns: what CI holds on to.

    python benchmarks/micro.py [--record]

`--record` writes benchmarks/micro.json; tests/integration/test_benchmarks.py fails where a ratio is 30 % below it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from manta import attention, lora, loss, model
from manta.data.batches import collate

RECORD = Path(__file__).with_name("micro.json")
KEPT = 0.7  # of a recorded ratio, at least
ROUNDS = 7

Arms = tuple[Callable[[], Any], Callable[[], Any]]  # the plain way, Manta's way


def of_attention() -> Arms:
    """Forward and backward over a packed row of 1,024 tokens: a dense mask against document by document."""
    lengths = [40, 310, 120, 75, 200, 19, 150, 110]
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(1024)
    mask = ((numbers[:, None] == numbers[None]) & (place[:, None] >= place[None]))[None, None]
    q, k, v = (torch.randn(1, 9, 1024, 64, requires_grad=True) for _ in range(3))

    def dense() -> None:
        scaled_dot_product_attention(q, k, v, mask).sum().backward()

    def documents() -> None:
        found, _ = attention.documents(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=edges, max_length_q=310)
        found.sum().backward()

    return dense, documents


def of_attention_in_bfloat16() -> Arms:
    """The same documents in bfloat16, three heads to a key: torch's own attention one by one against Manta's."""
    lengths = [40, 310, 120, 75, 200, 19, 150, 110]
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = (torch.randn(1, heads, 1024, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (9, 3, 3))

    def by_torch() -> None:
        parts = [
            scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, enable_gqa=True)
            for a, b in pairwise(edges.tolist())
        ]
        torch.cat(parts, dim=2).sum().backward()

    def by_manta() -> None:
        found, _ = attention.documents(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=edges, max_length_q=310)
        found.sum().backward()

    return by_torch, by_manta


def of_dropout() -> Arms:
    """An adapter on 1,024 tokens, there and back, on a layer too narrow to matter: PEFT's dropout against Manta's."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    x = torch.randn(1, 1024, 1536, requires_grad=True)
    adapter = LoraConfig(r=16, lora_dropout=0.1, target_modules=["0"])
    by_peft, by_manta = (
        inject_adapter_in_model(adapter, torch.nn.Sequential(torch.nn.Linear(1536, 16)).requires_grad_(False))
        for _ in range(2)
    )
    lora.lean(by_manta, torch.float32)
    return lambda: by_peft(x).sum().backward(), lambda: by_manta(x).sum().backward()


def of_logits() -> Arms:
    """A step of a small model with 16,000 words, a quarter of whose positions are trained: all logits against those."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    network = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=16_000))
    assert loss.keeps_logits(network)
    labels = np.where(np.arange(256) < 192, -100, 5)
    rows = [{"row": row, "input_ids": np.arange(256), "labels": labels, "starts": [0]} for row in range(4)]

    def stepping(picked: bool) -> Callable[[], None]:
        batch = collate(rows, 0, "packed", picked)
        given = {key: value for key, value in batch.items() if key not in ("rows", "tokens")}
        return lambda: network(**given).loss.backward()

    return stepping(False), stepping(True)


def of_padding() -> Arms:
    """A batch of uneven rows through a small model: padded to the longest against one row without padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    attention.register()
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    network = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=512))
    lengths = (30, 45, 60, 75, 90, 120, 200, 400)
    rows = [
        {"row": row, "input_ids": np.arange(length), "labels": np.arange(length), "starts": [0]}
        for row, length in enumerate(lengths)
    ]

    def stepping(layout: Any, implementation: str) -> Callable[[], None]:
        given = {key: value for key, value in collate(rows, 0, layout).items() if key not in ("rows", "tokens")}

        def step() -> None:
            network.set_attn_implementation(implementation)
            network(**given).loss.backward()

        return step

    return stepping("padded", "sdpa"), stepping("joined", attention.DOCUMENTS)


def of_labels() -> Arms:
    """Labels of 500 rows: tokenized twice one by one, as the guide does, against Manta's batches."""
    import labels

    from manta.data.tokenize import load_tokenizer
    from manta.demo import write_blank_model, write_data

    with TemporaryDirectory() as folder:
        corpus, questions = write_data(Path(folder))
        tokenizer = load_tokenizer(write_blank_model(Path(folder) / "blank", corpus))
        rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()[:500]]
    prompts, answers = [row["question"] for row in rows], [row["answer"] for row in rows]
    return (
        lambda: labels.one_by_one(tokenizer, prompts, answers),
        lambda: labels.batched(tokenizer, prompts, answers),
    )


def of_merge() -> Arms:
    """An adapter into 34 million parameters on disk: PEFT's merge and save against Manta's stream."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from manta.merge import merge_adapter

    folder = Path(_FOLDER.name)
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    network = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=1000, tie_word_embeddings=True)).bfloat16()
    network.save_pretrained(folder / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(network, lora).save_pretrained(folder / "adapter")

    def by_peft() -> None:
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged: Any = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
        merged.save_pretrained(folder / "out")

    def by_manta() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        merge_adapter(folder / "base", folder / "adapter", folder / "out")

    return by_peft, by_manta


_FOLDER = TemporaryDirectory(prefix="manta-micro-")

BENCHES: dict[str, Callable[[], Arms]] = {
    "labels": of_labels,
    "merge": of_merge,
    "attention": of_attention,
    "dropout": of_dropout,
    "logits": of_logits,
    "padding": of_padding,
}
if model.computes_bfloat16("cpu"):
    BENCHES["attention in bfloat16"] = of_attention_in_bfloat16


def ratio(name: str) -> float:
    """How many times faster Manta's way is: of medians, in the order A B B A."""
    arms = BENCHES[name]()
    took: tuple[list[float], list[float]] = ([], [])
    for arm in arms:
        arm()
    for number in range(2 * ROUNDS):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            arms[which]()
            took[which].append(time.perf_counter() - begin)
    return statistics.median(took[0]) / statistics.median(took[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    ratios = {name: round(ratio(name), 2) for name in BENCHES}
    print(json.dumps(ratios, indent=2))
    if options.record:
        RECORD.write_text(json.dumps(ratios, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
