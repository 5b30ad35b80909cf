"""Manta fine-tunes Hugging Face causal language models on Ray.

Names are imported when they are first used, so that `import manta` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "HFDatasetConfig": "config",
    "ConfigError": "errors",
    "TrainingError": "errors",
    "UserError": "errors",
    "SFTDataset": "data.sft",
    "load_and_prepare_datasets": "data.sft",
    "RayTrainReportCallback": "callbacks",
    "SaveOnBestMetricCallback": "callbacks",
    "train_func": "worker",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from manta.callbacks import RayTrainReportCallback as RayTrainReportCallback
    from manta.callbacks import SaveOnBestMetricCallback as SaveOnBestMetricCallback
    from manta.config import Config as Config
    from manta.config import HFDatasetConfig as HFDatasetConfig
    from manta.data.sft import SFTDataset as SFTDataset
    from manta.data.sft import load_and_prepare_datasets as load_and_prepare_datasets
    from manta.errors import ConfigError as ConfigError
    from manta.errors import TrainingError as TrainingError
    from manta.errors import UserError as UserError
    from manta.worker import train_func as train_func


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'manta' has no attribute {name!r}")
    return getattr(importlib.import_module(f"manta.{_HOME[name]}"), name)
