"""Answers generated beside training, for a best checkpoint and an early stop by what a model says.

Ray runs this after a checkpoint's report, on resources that are not the workers' (`ray.train.ValidationConfig`), and
keeps the checkpoint until it is done. A validation that fails costs its figure, never the run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

from manta import answers, metrics, scores, storage
from manta.answers import Answerer
from manta.config import Config
from manta.data.prepare import Prepared
from manta.data.tokenize import load_tokenizer
from manta.generation import Sampling, Weights
from manta.model import WEIGHTS
from manta.progress import find_mailbox
from manta.runs import Run, step_of

TIMEOUT_S = 3600.0


def for_ray(config: Config, run: Run, prepared: Prepared, mailbox: str, resources: dict[str, float]) -> Any:
    """Ray's ValidationConfig: what answers the rows reserves `resources`."""
    from ray.train import ValidationConfig, ValidationTaskConfig

    given = {
        "run": str(run.path),
        "config": config.to_dict(),
        "prepared": str(prepared.path),
        "mailbox": mailbox,
        "resources": resources,
    }
    # Ray's own task only waits for another, which holds the resources.
    return ValidationConfig(cast(Any, validate), ValidationTaskConfig(given), {"num_cpus": 0, "max_retries": -1})


def validate(
    checkpoint: Any, run: str, config: dict[str, Any], prepared: str, mailbox: str, resources: dict[str, float]
) -> dict[str, float]:
    """What Ray calls with a checkpoint. Tells the mailbox, and returns what goes on Ray's list.

    The work is done in a task of its own, so that not even the death of its process ends the run.
    """
    import ray

    name = Path(checkpoint.path).name
    others = {key: value for key, value in resources.items() if key not in ("CPU", "GPU")}
    task: Any = ray.remote(figures).options(
        num_cpus=resources.get("CPU", 1), num_gpus=resources.get("GPU", 0), resources=others, max_retries=1
    )
    listener: Any = find_mailbox(mailbox)
    began = time.time()
    try:
        found = ray.get(task.remote(run, name, config, prepared), timeout=TIMEOUT_S)
    except Exception as error:  # whatever ended it
        text = str(error).strip().splitlines()
        why = text[-1] if text else type(error).__name__
        ray.get(listener.put.remote({"kind": "note", "text": f"the answers of {name} have no figures: {why}"}))
        return {}
    seconds = round(time.time() - began, 1)
    ray.get(listener.validated.remote({"checkpoint": name, "step": step_of(Path(name)), **found, "seconds": seconds}))
    return found


def figures(run: str, checkpoint: str, config_dict: dict[str, Any], prepared: str) -> dict[str, float]:
    """Metrics of the checkpoint's answers to the first `validation_samples` rows of the validation split, greedy."""
    import torch

    config = Config.from_dict(config_dict)
    text = Prepared(storage.place(prepared)).fetched().text("validation")
    with text.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(config.validation_samples), strict=False)]
    sampling = Sampling(max_tokens=config.validation_max_tokens, temperature=0, max_model_len=config.max_seq_length * 2)
    tokenizer: Any = load_tokenizer(config.hf_model_id, config.trust_remote_code)
    setting = answers.setting(config, tokenizer, sampling, "cuda" if torch.cuda.is_available() else "cpu")
    weights = str(Run(storage.place(run)).path / checkpoint / WEIGHTS)
    model = Weights(weights) if config.full_ft else Weights(config.hf_model_id, weights)
    asked = answers.as_rows(rows, tokenizer, config, sampling)
    engine, given = Answerer(setting, None), []
    size = config.per_device_eval_batch_size
    for first in range(0, len(asked), size):
        given += engine.answer(model, asked[first : first + size], config.seed)
    said = [tokenizer.decode(each.ids, skip_special_tokens=True) for each in given]
    references = [row["output"] for row in rows]
    rule = metrics.rule("auto", "auto", references)
    found = scores.of_model(scores.of_rows(said, references, rule), given, said, references)
    return {name: round(value, 6) for name, value in found.items() if isinstance(value, float)}
