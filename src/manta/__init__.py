"""Manta fine-tunes Hugging Face causal language models on Ray.

Names are imported when they are first used, so that `import manta` stays quick.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "prepare": "api",
    "train": "api",
    "evaluate": "api",
    "convert": "api",
    "Config": "config",
    "HFDatasetConfig": "config",
    "Prepared": "data.prepare",
    "TrainResult": "results",
    "Evaluation": "results",
    "Scores": "results",
    "Gain": "results",
    "Sampling": "generation",
    "Scoring": "scores",
    "Where": "evaluate",
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
    from manta.api import convert as convert
    from manta.api import evaluate as evaluate
    from manta.api import prepare as prepare
    from manta.api import train as train
    from manta.callbacks import RayTrainReportCallback as RayTrainReportCallback
    from manta.callbacks import SaveOnBestMetricCallback as SaveOnBestMetricCallback
    from manta.config import Config as Config
    from manta.config import HFDatasetConfig as HFDatasetConfig
    from manta.data.prepare import Prepared as Prepared
    from manta.data.sft import SFTDataset as SFTDataset
    from manta.data.sft import load_and_prepare_datasets as load_and_prepare_datasets
    from manta.errors import ConfigError as ConfigError
    from manta.errors import TrainingError as TrainingError
    from manta.errors import UserError as UserError
    from manta.evaluate import Where as Where
    from manta.generation import Sampling as Sampling
    from manta.results import Evaluation as Evaluation
    from manta.results import Gain as Gain
    from manta.results import Scores as Scores
    from manta.results import TrainResult as TrainResult
    from manta.scores import Scoring as Scoring
    from manta.worker import train_func as train_func


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'manta' has no attribute {name!r}")
    return getattr(importlib.import_module(f"manta.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """`manta.train` is the function, also when the room of that name was imported, which import would put there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
