"""From a run's checkpoint to a Hugging Face model folder that plain transformers loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manta import __version__, manifest, storage
from manta.config import Config
from manta.data.prepare import Prepared
from manta.data.tokenize import load_tokenizer
from manta.errors import UserError
from manta.model import WEIGHTS
from manta.runs import Checkpoint, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KIND = "export"


def convert(run: Run, output: Path | None = None, merge: bool = True) -> Path:
    """Write the best checkpoint of `run` as a model folder, or as an adapter with `merge=False`; returns the folder.

    The folder appears whole or not at all, outside the checkpoints that rotation deletes. Raises UserError if there is
    no usable checkpoint, or something that is not ours stands at `output`.
    """
    config = run.config()
    if not merge and config.full_ft:
        raise UserError(f"{run.name} trained every weight: there is no adapter to keep apart. Leave out --no_merge.")
    checkpoint = usable_checkpoint(run)
    output = storage.place(output) if output else run.path / ("export" if merge else "adapter")
    _check_replaceable(output)
    near = storage.near(output)
    near.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=near.parent))
    try:
        if merge:
            tuned = load_tuned(config, checkpoint, torch.float32)
            tuned = tuned if config.full_ft else tuned.merge_and_unload()
            _as_the_base_was(tuned, config).save_pretrained(staging)
        else:
            shutil.copytree(checkpoint.path / WEIGHTS, staging, dirs_exist_ok=True)
        tokenizer = load_tokenizer(config.hf_model_id, config.trust_remote_code)
        tokenizer.chat_template = Prepared(run.prepared()).chat_template() or tokenizer.chat_template
        tokenizer.save_pretrained(staging)
        lineage = {
            "kind": KIND,
            "run": str(run.path),
            "checkpoint": checkpoint.path.name,
            "metrics": checkpoint.metrics,
            "config": config.to_dict(),
            "manta": __version__,
        }
        manifest.close(staging, manifest.digests(staging), lineage)
        staging.chmod(0o755)  # temporary folders are private
        if storage.is_remote(output):
            storage.publish(staging, output)
        else:
            _swap(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def usable_checkpoint(run: Run) -> Checkpoint:
    """The best checkpoint whose files are as they were written, on this node. Raises UserError if there is none."""
    problems = []
    for checkpoint in run.ranked():
        problem = storage.problem(checkpoint.path)
        if problem is None:
            return replace(checkpoint, path=storage.fetch(checkpoint.path))
        problems.append(f"{checkpoint.path.name}: {problem}")
    raise UserError(f"{run.path} has no usable checkpoint ({'; '.join(problems) or 'none was written'}). Train first.")


def load_tuned(config: Config, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The tuned model on the CPU: a full model, or a PeftModel over its base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    weights = str(checkpoint.path / WEIGHTS)
    source = weights if config.full_ft else config.hf_model_id
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=config.trust_remote_code)
    return model if config.full_ft else PeftModel.from_pretrained(model, weights)


def _as_the_base_was(model: Any, config: Config) -> PreTrainedModel:
    """In the base's precision (cast once, after the merge in float32) and with its settings for generation."""
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(config.hf_model_id, trust_remote_code=config.trust_remote_code)
    model.config.use_cache = getattr(base, "use_cache", True)
    return model.to(base.dtype or torch.float32)


def _check_replaceable(output: Path) -> None:
    about = manifest.read(output)
    ours = about is not None and about.get("kind") == KIND
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not ours:
        raise UserError(f"{output} exists and was not written by `manta convert`. Give another --output_dir.")


def _swap(staging: Path, output: Path) -> None:
    old = output.with_name(f".{output.name}-old-{os.getpid()}")
    if output.exists():
        output.rename(old)
    staging.rename(output)
    shutil.rmtree(old, ignore_errors=True)
