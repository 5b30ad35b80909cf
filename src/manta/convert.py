"""From a checkpoint to a Hugging Face folder that plain transformers loads: merged, verified, with a model card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from manta import __version__, card, hub, manifest, storage, verification
from manta.config import Config
from manta.data.prepare import Prepared
from manta.data.tokenize import load_tokenizer
from manta.errors import UserError
from manta.merge import MAX_SHARD_SIZE, merge_adapter, write_full
from manta.model import WEIGHTS
from manta.runs import Checkpoint, Run
from manta.trained import Trained
from manta.versions import versions

KIND = "export"


@dataclass(frozen=True)
class Options:
    """How a folder is made: an adapter `merge`d or kept apart, shards of at most `max_shard_size`, and `verify`:
    whether its logits are compared with those of what was trained before it appears.
    """

    merge: bool = True
    max_shard_size: str = MAX_SHARD_SIZE
    verify: bool = True


def convert(
    run: Run, output: Path | None = None, merge: bool = True, checkpoint: str = "best", options: Options | None = None
) -> Path:
    """Write a checkpoint of `run` (best, latest, or a step) as a model folder, or as an adapter with `merge=False`;
    returns the folder.

    It appears whole or not at all, outside the checkpoints that rotation deletes. Raises UserError if there is no such
    checkpoint, it cannot be merged, or something that is not ours stands at `output`; TrainingError if the model that
    was made does not compute what was trained.
    """
    options = replace(options or Options(), merge=merge)
    if not merge and run.config().full_ft:
        raise UserError(f"{run.name} trained every weight: there is no adapter to keep apart. Leave out --no_merge.")
    return write(of_run(run, checkpoint), output or run.path / ("export" if merge else "adapter"), options)


def of_run(run: Run, checkpoint: str = "best") -> Trained:
    """A checkpoint of a run, fetched and verified. Raises UserError if there is none that is whole."""
    config, chosen = run.config(), usable_checkpoint(run, checkpoint)
    try:
        prepared = Prepared(run.prepared())
    except UserError:  # the weights are good without their data
        prepared = None
    lineage = {
        "run": str(run.path),
        "checkpoint": chosen.path.name,
        "metrics": chosen.metrics,
        "config": config.to_dict(),
        "data": prepared.path.name if prepared else None,
    }
    return Trained(run.name, chosen.path / WEIGHTS, config.hf_model_id, lineage, config, prepared)


def write(trained: Trained, output: Path, options: Options | None = None) -> Path:
    """Write the folder `output`; the errors are those of `convert`."""
    options = options or Options()
    if not options.merge and not trained.is_adapter:
        raise UserError(
            f"{trained.weights} holds every weight: there is no adapter to keep apart. Leave out --no_merge."
        )
    output = storage.place(output)
    _check_replaceable(output)
    with _staging(output) as staging:
        lineage = {"lora": trained.is_adapter, "merged": options.merge, "base_model": trained.base}
        lineage |= {**trained.lineage, "manta": __version__, "versions": versions()}
        tokenizer = load_tokenizer(trained.tokenizer_source(), trained.trust_remote_code)
        if trained.prepared:
            tokenizer.chat_template = trained.prepared.chat_template() or tokenizer.chat_template
        _write_weights(trained, staging, options)
        if options.verify and options.merge:
            lineage["verified"] = verification.verify(
                trained.base, trained.weights, staging, _prompts(trained, tokenizer), trained.trust_remote_code
            )
        tokenizer.save_pretrained(staging)
        card.write(staging, trained.name, lineage, trained.config)
        manifest.close(staging, manifest.digests(staging), {"kind": KIND, **lineage})
        staging.chmod(0o755)  # temporary folders are private
        if storage.is_remote(output):
            storage.publish(staging, output)
        else:
            _swap(staging, output)
    return output


def push(output: Path, repo: str, private: bool) -> str:
    """Upload a folder that `convert` wrote; returns its address. Raises UserError if the hub refuses."""
    return hub.push(storage.fetch(output), repo, private)


def usable_checkpoint(run: Run, which: str = "best") -> Checkpoint:
    """The best or latest checkpoint whose files are as they were written, or that of a step, on this node.

    Raises UserError if there is none.
    """
    candidates = run.ranked()
    if which == "latest":
        candidates.sort(key=lambda found: -found.step)
    elif which != "best":
        steps = sorted({found.step for found in candidates})
        candidates = [found for found in candidates if str(found.step) == which]
        if not candidates:
            raise UserError(f"{run.path} has no checkpoint {which}. It has {steps}; or say best or latest.")
    problems = []
    for checkpoint in candidates:
        problem = storage.problem(checkpoint.path)
        if problem is None:
            return replace(checkpoint, path=storage.fetch(checkpoint.path))
        problems.append(f"{checkpoint.path.name}: {problem}")
    raise UserError(
        f"{run.path} has no usable checkpoint ({'; '.join(problems) or 'none was written'}). Train it on: manta train "
        f"--resume {run.path}"
    )


def load_tuned(config: Config, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The tuned model on the CPU: a full model, or a PeftModel over its base."""
    return verification.load(config.hf_model_id, checkpoint.path / WEIGHTS, dtype, config.trust_remote_code)


def _write_weights(trained: Trained, staging: Path, options: Options) -> None:
    if not options.merge:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(trained.weights / name, staging / name)
        return
    base = hub.local_files(trained.base, weights=trained.is_adapter)
    act = merge_adapter if trained.is_adapter else write_full
    act(base, trained.weights, staging, options.max_shard_size, trained.trust_remote_code)
    if not (staging / "generation_config.json").exists():
        from transformers import AutoConfig, GenerationConfig

        config = AutoConfig.from_pretrained(staging, trust_remote_code=trained.trust_remote_code)
        GenerationConfig.from_model_config(config).save_pretrained(staging)


def _prompts(trained: Trained, tokenizer: Any) -> list[list[int]]:
    """Token ids of held-out rows, or of a few fixed texts where there are none."""
    texts = trained.test_texts(verification.PROMPTS) or [(text, False) for text in verification.FIXED_PROMPTS]
    ids = [tokenizer(text, add_special_tokens=not whole, verbose=False)["input_ids"] for text, whole in texts]
    return [each[: verification.TOKENS] for each in ids if each]


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder beside `output`, or beside its place in this node's cache, that is gone afterwards."""
    near = storage.near(output)
    near.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=near.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
