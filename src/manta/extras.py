"""Settings that name something of a library's, or need a package that not everybody has: looked at before anything
starts, since a worker that lacks it fails, and fails again.

On a cluster that is joined, packages are the nodes' matter: only names are checked here.
"""

from __future__ import annotations

import difflib
import importlib.util
import netrc
import os
from collections.abc import Collection
from urllib.parse import urlsplit

from manta import attention
from manta.config import Config
from manta.errors import ConfigError

# Setting's value, or a part of it → module, and how it is installed.
_ATTENTION = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": (
        "flash_attn_interface",
        "build it from github.com/Dao-AILab/flash-attention/tree/main/hopper",
    ),
}
_OPTIMIZERS = {
    **dict.fromkeys(("bnb", "8bit", "paged", "lion"), ("bitsandbytes", "pip install bitsandbytes")),
    "galore": ("galore_torch", "pip install galore-torch"),
    "apollo": ("apollo_torch", "pip install apollo-torch"),
    "schedule_free": ("schedulefree", "pip install schedulefree"),
    "lomo": ("lomo_optim", "pip install lomo-optim"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
}
_TRACKERS = {name: (name, f"pip install 'manta-train[{name}]'") for name in ("tensorboard", "wandb", "mlflow")}
_WANDB = "https://api.wandb.ai"


def check(config: Config) -> None:
    """Raises ConfigError for an attention, optimizer or tracker that there is not, or whose package is not here."""
    from transformers import AttentionInterface
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.training_args import OptimizerNames

    joined = bool(config.ray_address or os.environ.get("RAY_ADDRESS"))
    wanted = config.attn_implementation
    if "/" not in wanted:  # else a kernel of the hub
        _known(
            "attn_implementation", wanted, {"auto", "eager", attention.DOCUMENTS, *AttentionInterface().valid_keys()}
        )
    optimizers = {name.value for name in OptimizerNames}
    _known("optim", config.optim, optimizers)
    needs = [("attn_implementation", wanted, _ATTENTION.get(wanted))]
    needs += [("optim", config.optim, about) for part, about in _OPTIMIZERS.items() if part in config.optim][:1]
    for tracker in trackers(config):
        _known("report_to", tracker, {"all", *INTEGRATION_TO_CALLBACK})
        needs.append(("report_to", tracker, _TRACKERS.get(tracker)))
    for setting, value, about in needs:
        if about and not joined and importlib.util.find_spec(about[0]) is None:
            raise ConfigError(
                f"{setting} {value} needs the package {about[0]}, which is not installed here. Install it "
                f"({about[1]}), or leave out --{setting}."
            )
    if "wandb" in trackers(config) and not joined and not _has_wandb_key():
        raise ConfigError(
            "report_to wandb, but there is no key for it: the workers would wait for one. Type `wandb login`, set "
            "WANDB_API_KEY, or WANDB_MODE=offline; or leave out --report_to."
        )


def trackers(config: Config) -> list[str]:
    """Names in `report_to`, with wandb if `use_wandb` adds it."""
    named = [] if config.report_to == "none" else [name.strip() for name in config.report_to.split(",")]
    return named + (["wandb"] if config.use_wandb and "wandb" not in named else [])


def _known(setting: str, value: str, names: Collection[str]) -> None:
    if value in names:
        return
    nearest = sorted(name for name in names if name.startswith(value)) or difflib.get_close_matches(value, names)
    shown = f"Did you mean {', '.join(nearest)}?" if nearest else f"There are: {', '.join(sorted(names))}."
    raise ConfigError(f"{setting} {value} is not known. {shown} Set --{setting}.")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _WANDB)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
