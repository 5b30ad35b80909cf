"""Base against tuned on the held-out test split of the same prepared data: loss and exact match."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from manta import manifest, storage
from manta.config import Config
from manta.convert import load_tuned, usable_checkpoint
from manta.data.batches import collate
from manta.data.tokenize import IGNORE, Encoder, Rendered, fit, load_tokenizer, stop_tokens
from manta.errors import UserError
from manta.runs import Checkpoint, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS_BATCH = 16  # rows scored at once: logits of a batch take batch × length × vocabulary × 4 bytes


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 takes the likeliest token; lengths are in tokens."""

    max_tokens: int = 512
    temperature: float = 0.1
    top_p: float = 0.95
    top_k: int = -1
    max_model_len: int = 8192

    def arguments(self) -> dict[str, Any]:
        """For `generate` of transformers."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        top_k = None if self.top_k < 0 else self.top_k
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": top_k}


def evaluate(
    run: Run,
    test_path: str | Path | None = None,
    max_samples: int = 1024,
    batch_size: int = 128,
    sampling: Sampling | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Score base and tuned; returns and writes `evaluation/metrics.json`, with `predictions.jsonl` beside it.

    `loss` is the mean over output tokens and EOS, in nats; `exact_match` the share of rows whose answer equals the
    reference but for white space around it. Raises UserError if there is nothing to score.
    """
    sampling = sampling or Sampling()
    config = run.config()
    checkpoint = usable_checkpoint(run)
    rows = _test_rows(run, storage.place(test_path) if test_path else None)[:max_samples]
    tokenizer = load_tokenizer(config.hf_model_id, config.trust_remote_code)
    stops: Any = tokenizer.convert_tokens_to_ids(stop_tokens(config.hf_model_id, tokenizer))
    where = _device(device)
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(
        dtype, torch.bfloat16 if where.type == "cuda" else torch.float32
    )

    report: dict[str, Any] = {
        "run": str(run.path),
        "checkpoint": checkpoint.path.name,
        "rows": len(rows),
        "sampling": asdict(sampling),
        "models": {},
    }
    answers: dict[str, list[str]] = {}
    for name, model in _models(config, checkpoint, kind, where):
        torch.manual_seed(config.seed)
        answers[name] = _generate(model, tokenizer, rows, stops, batch_size, sampling)
        hits = [given.strip() == row["output"].strip() for given, row in zip(answers[name], rows, strict=True)]
        report["models"][name] = {
            "loss": _loss(model, tokenizer, rows, config.max_seq_length),
            "exact_match": sum(hits) / len(rows),
        }

    folder = run.path / "evaluation"
    storage.make_folder(folder)
    lines = [
        json.dumps({**row, **{name: given[i] for name, given in answers.items()}}, ensure_ascii=False)
        for i, row in enumerate(rows)
    ]
    manifest.write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    manifest.write_json(folder / "metrics.json", report)
    return report


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """Base against tuned, one line each."""
    table = Table(title=f"{report['rows']} held-out rows, {report['checkpoint']}")
    for heading in ("model", "loss", "exact match"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, figures in report["models"].items():
        table.add_row(name, f"{figures['loss']:.4f}", f"{figures['exact_match']:.1%}")
    (console or Console(highlight=False)).print(table)


def _test_rows(run: Run, path: Path | None) -> list[dict[str, Any]]:
    path = path or run.prepared() / "test.jsonl"
    if not path.is_file():
        raise UserError(f"There is no test data {path}. Give --test_path, or `manta prepare` it again.")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no rows. Raise --hfdc_val_test_split_ratio, or give --test_path.")
    if missing := {"input", "output"} - set(rows[0]):
        raise UserError(f"The rows of {path} lack {sorted(missing)}; each line needs input and output.")
    return rows


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this machine has no GPU that torch can use. Use --device cpu or auto.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _models(
    config: Config, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Any]]:
    """("base", model), then ("tuned", model). With LoRA both are one model, its adapter off and on."""
    from transformers import AutoModelForCausalLM

    tuned: Any = load_tuned(config, checkpoint, dtype).to(device).eval()
    if config.full_ft:
        base: Any = AutoModelForCausalLM.from_pretrained(
            config.hf_model_id, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        yield "base", base.to(device).eval()
    else:
        with tuned.disable_adapter():
            yield "base", tuned
    yield "tuned", tuned


def _is_chat(row: dict[str, Any]) -> bool:
    """Whether a row is a conversation, whose prompt holds its special tokens already."""
    return "messages" in row


def _rendered(row: dict[str, Any]) -> Rendered:
    text = row["input"] + row["output"] + (row.get("end", "") if _is_chat(row) else "")
    return Rendered(text, ((len(row["input"]), len(text)),), _is_chat(row))


@torch.inference_mode()
def _loss(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], max_length: int) -> float | None:
    """Mean over the trained tokens of all rows, each cut to `max_length` tokens; None if no row has one."""
    encode = Encoder(tokenizer).encode
    samples = [encode([_rendered(row)])[0] for row in rows]  # one by one: a mixture has rows of both kinds
    fitted = [piece for sample in samples for piece in fit(sample, max_length, "truncate") if piece.trains]
    fitted.sort(key=lambda sample: len(sample.input_ids))
    total, tokens = 0.0, 0
    for first in range(0, len(fitted), LOSS_BATCH):
        chosen = [{"row": 0, "starts": [0], **vars(sample)} for sample in fitted[first : first + LOSS_BATCH]]
        batch = collate(chosen, tokenizer.pad_token_id)
        batch.pop("rows"), batch.pop("tokens")
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        total += float(model(**{key: value.to(model.device) for key, value in batch.items()}).loss) * count
        tokens += count
    return total / tokens if tokens else None


@torch.inference_mode()
def _generate(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], stops: list[int], batch_size: int, sampling: Sampling
) -> list[str]:
    """Answers in the order of `rows`, each up to one of `stops`. A prompt that fills the model gets an empty one."""
    limit = min(sampling.max_model_len, getattr(model.config, "max_position_embeddings", sampling.max_model_len))
    ids = [tokenizer(row["input"], add_special_tokens=not _is_chat(row), verbose=False)["input_ids"] for row in rows]
    order = sorted((i for i in range(len(rows)) if 0 < len(ids[i]) < limit), key=lambda i: len(ids[i]))
    answers = [""] * len(rows)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        longest = len(ids[chosen[-1]])
        batch = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(batch)
        for row, i in enumerate(chosen):  # padded on the left: generation goes on at the right
            batch[row, longest - len(ids[i]) :] = torch.tensor(ids[i])
            mask[row, longest - len(ids[i]) :] = 1
        output = model.generate(
            input_ids=batch.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=min(sampling.max_tokens, limit - longest),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stops,
            use_cache=True,
            **sampling.arguments(),
        )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers
