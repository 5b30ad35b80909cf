"""Layers compiled some steps into a run, each by itself, and kept so if that makes the steps faster.

A whole model takes minutes to compile, and again for each new shape; its layers are alike, so that one is compiled for
all of them, for sequences of any length (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from manta import checkpoint, model

if TYPE_CHECKING:
    from manta.trainer import MantaTrainer

_PLAIN = 6  # steps that are timed as they are, the first of which warms up
_WARM = 2  # compiled steps that compile, for one length and then for all
_TIMED = 5


class CompileCallback(TrainerCallback):
    """Times steps, compiles the layers, times again; `say` hears what came of it. All ranks have one, and decide
    alike."""

    def __init__(self, network: Any, trainer: MantaTrainer, say: Callable[[str], None]):
        self.network, self.trainer, self.say = network, trainer, say
        self.per_token: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if len(self.seconds) == _PLAIN:
            compile_layers(self.network)
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if len(self.seconds) == _PLAIN + _WARM + _TIMED:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.per_token.append(self.seconds[-1] / max(self.trainer.tokens, 1))
        if len(self.seconds) == _PLAIN + _WARM + _TIMED:
            self._judge()

    def _judge(self) -> None:
        mine = (self.per_token[1:_PLAIN], self.per_token[_PLAIN + _WARM :], self.seconds[_PLAIN : _PLAIN + _WARM])
        plain, compiled, compiling = map(list, zip(*checkpoint.gather(mine), strict=True))
        # The slowest rank is the pace of all.
        before, after = (max(statistics.median(each) for each in found) for found in (plain, compiled))
        spent = max(map(sum, compiling))
        saved = 1 - after / before
        told = (
            f"layers compiled in {spent:.0f} s: a token takes {abs(saved):.0%} {'less' if saved > 0 else 'more'} time"
        )
        if saved <= 0:
            uncompile_layers(self.network)
            self.say(f"{told}, so they run as they are again")
            return
        step = statistics.median(self.seconds[1:_PLAIN])
        self.say(f"{told}, which has paid after {spent / (step * saved):,.0f} steps")


def compile_layers(network: Any) -> None:
    """Have every decoder layer of a model compiled when it runs next, whatever the length of its sequence."""
    for layer in _layers(network):
        layer.compile(dynamic=True)


def uncompile_layers(network: Any) -> None:
    """Back to what the layers are in Python."""
    for layer in _layers(network):
        layer._compiled_call_impl = None


def _layers(network: Any) -> list[torch.nn.Module]:
    return [network.get_submodule(name) for name in sorted(model.layer_names(network))]
