"""A model before its weights are loaded: its architecture, names and shapes, and all that can be wrong with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from manta import diagnosis
from manta.config import Config
from manta.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def check(config: Config) -> None:
    """Everything about the model that can be wrong before a worker starts. Raises UserError; loads no weights."""
    architecture = _architecture(config)
    folder = Path(config.hf_model_id).expanduser()
    if folder.is_dir():
        _check_weights(folder)
    bare = skeleton(config)
    if not config.full_ft:
        _check_targets(bare, config)
    longest = getattr(architecture, "max_position_embeddings", None)
    if longest and config.max_seq_length > longest:
        raise ConfigError(
            f"max_seq_length {config.max_seq_length} is over the model's {longest} positions. Set --max_seq_length "
            f"{longest} or less; --overlong_policy says what becomes of longer samples."
        )


def skeleton(config: Config) -> PreTrainedModel:
    """The base model without storage: names and shapes only."""
    from transformers import AutoModelForCausalLM

    architecture = _architecture(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UserError(
            f"The model {config.hf_model_id} ({architecture.model_type}) is no causal language model, which is what is "
            "fine-tuned here. Give --hf_model_id one whose card says text generation."
        ) from error


def _architecture(config: Config) -> PretrainedConfig:
    from huggingface_hub.utils import logging
    from transformers import AutoConfig

    logging.set_verbosity_error()  # one message at the end instead of one per retry
    try:
        return AutoConfig.from_pretrained(config.hf_model_id, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise UserError(_no_architecture(config.hf_model_id, error)) from error


def _no_architecture(name: str, error: Exception) -> str:
    said = str(error)
    if "custom code" in said or "trust_remote_code" in said:
        return (
            f"The model {name} comes with Python code of its own, which would run here with your rights. Read its *.py "
            "files; if you trust them: --trust_remote_code."
        )
    if "does not recognize this architecture" in said:
        import transformers

        kind = re.search(r"model type `(.+?)`", said)
        return (
            f"The model {name} is of the type {kind.group(1) if kind else '?'}, which transformers "
            f"{transformers.__version__} does not know. A newer one may: pip install -U transformers."
        )
    reason = diagnosis.unloadable(name, error)
    return f"The model {name} is neither a folder with a config.json here nor a model the hub gives us: {reason}."


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        raise UserError(
            f"{folder} holds no *.safetensors weights{f', but {pickles}, which may run code' if pickles else ''}. "
            "Check --hf_model_id, download a revision of the model that has them, or save it anew with save_pretrained."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut off ({error}). Download the model again.") from error


def _check_targets(bare: PreTrainedModel, config: Config) -> None:
    if config.lora_target_modules.strip() == "all-linear":
        return
    names = {name.rpartition(".")[2] for name, module in bare.named_modules() if hasattr(module, "weight")}
    wanted = [name.strip() for name in config.lora_target_modules.split(",")]
    if missing := [name for name in wanted if name.rpartition(".")[2] not in names]:
        linear = sorted(
            {
                name.rpartition(".")[2]
                for name, module in bare.named_modules()
                if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
            }
        )
        raise ConfigError(
            f"lora_target_modules names {missing}, which {config.hf_model_id} does not have. "
            f"Its linear modules: {', '.join(linear) or 'none'}. Set --lora_target_modules, or all-linear."
        )
