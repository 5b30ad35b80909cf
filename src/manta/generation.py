"""Who answers: one small interface, with transformers behind it, or vLLM in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from manta.data.batches import collate
from manta.data.tokenize import IGNORE
from manta.errors import UserError

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


@dataclass(frozen=True)
class Weights:
    """A model to load: a folder or hub name, with a LoRA adapter's folder over it or None."""

    source: str
    adapter: str | None = None


@dataclass(frozen=True)
class Setting:
    """What all answers of an engine have in common. `stops` are token ids that end an answer."""

    stops: tuple[int, ...]
    pad: int
    sampling: Sampling
    dtype: str  # auto, bfloat16 or float32
    device: str  # cpu or cuda
    trust_remote_code: bool = False
    most_rank: int = 8  # of the adapters that will be asked for
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9

    @property
    def precision(self) -> str:
        return {"auto": "bfloat16" if self.device == "cuda" else "float32"}.get(self.dtype, self.dtype)


@dataclass(frozen=True)
class Target:
    """Token ids and labels of a reference behind its prompt; IGNORE where nothing is scored. Both may be empty."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Answer:
    """`ids` without the stop token; `cut` where the limit of tokens ended it. `loss` is the reference's, a sum in nats
    over `scored` tokens."""

    ids: list[int]
    cut: bool
    loss: float
    scored: int


class Engine(Protocol):
    """Loads what it is asked for, and keeps the base of the last one."""

    def answer(
        self, weights: Weights, prompts: Sequence[list[int]], targets: Sequence[Target], seed: int
    ) -> list[Answer]:
        """One answer for each prompt. No prompt is empty or fills the model. The same call gives the same answers."""
        ...


class HfEngine:
    """transformers' `generate`, padded batches. One base at a time is loaded, with the adapters that were asked for."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self._source = ""
        self._model: Any = None

    @torch.inference_mode()
    def answer(
        self, weights: Weights, prompts: Sequence[list[int]], targets: Sequence[Target], seed: int
    ) -> list[Answer]:
        with self._loaded(weights) as model:
            torch.manual_seed(seed)
            outputs = self._generate(model, prompts)
            scores = self._score(model, targets)
        return [Answer(ids, cut, loss, count) for (ids, cut), (loss, count) in zip(outputs, scores, strict=True)]

    def _generate(self, model: Any, prompts: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
        setting, longest = self.setting, max(len(ids) for ids in prompts)
        batch = torch.full((len(prompts), longest), setting.pad)
        mask = torch.zeros_like(batch)
        for row, ids in enumerate(prompts):  # padded on the left: generation goes on at the right
            batch[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        limit = min(setting.sampling.max_tokens, longest_of(model.config, setting.sampling) - longest)
        output = model.generate(
            input_ids=batch.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=limit,
            pad_token_id=setting.pad,
            eos_token_id=list(setting.stops),
            use_cache=True,
            **setting.sampling.arguments(),
        )
        return [self._until_stop(row, limit) for row in output[:, longest:].tolist()]

    def _until_stop(self, ids: list[int], limit: int) -> tuple[list[int], bool]:
        ends = [index for index, token in enumerate(ids) if token in self.setting.stops]
        return (ids[: ends[0]], False) if ends else (ids, len(ids) >= limit)

    def _score(self, model: Any, targets: Sequence[Target]) -> list[tuple[float, int]]:
        found = [(0.0, 0)] * len(targets)
        order = sorted((i for i, each in enumerate(targets) if each.input_ids), key=lambda i: len(targets[i].input_ids))
        for first in range(0, len(order), LOSS_BATCH):
            chosen = order[first : first + LOSS_BATCH]
            batch = collate([{"row": i, "starts": [0], **asdict(targets[i])} for i in chosen], self.setting.pad)
            labels = batch["labels"][:, 1:].to(model.device)
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE
            ).view(labels.shape)
            counts = (labels != IGNORE).sum(1)
            for row, index in enumerate(chosen):
                found[index] = float(losses[row].double().sum()), int(counts[row])
        return found

    @contextmanager
    def _loaded(self, weights: Weights) -> Iterator[Any]:
        """The model as `weights` says: its base is loaded once, adapters are put over it and switched."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        if weights.source != self._source:
            self._model = None  # before the next one takes memory
            model: Any = AutoModelForCausalLM.from_pretrained(
                weights.source,
                dtype=getattr(torch, self.setting.precision),
                trust_remote_code=self.setting.trust_remote_code,
            )
            self._source, self._model = weights.source, model.to(self.setting.device).eval()
        has_adapters = isinstance(self._model, PeftModel)
        if weights.adapter is not None:
            name = weights.adapter.replace(".", "_")  # names of modules have no dots
            if not has_adapters:
                self._model = PeftModel.from_pretrained(self._model, weights.adapter, adapter_name=name).eval()
            elif name not in self._model.peft_config:
                self._model.load_adapter(weights.adapter, adapter_name=name)
            self._model.set_adapter(name)
        without = self._model.disable_adapter() if has_adapters and weights.adapter is None else nullcontext()
        with without:
            yield self._model


class VllmEngine:
    """vLLM in a process of its own, by the Python of its own environment: it pins other libraries than training does.

    One process per base; adapters are loaded into it as LoRA, without a merge. See `vllm_process`.
    """

    def __init__(self, setting: Setting, python: str):
        self.setting, self.python = setting, python
        self._source = ""
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)

    def answer(
        self, weights: Weights, prompts: Sequence[list[int]], targets: Sequence[Target], seed: int
    ) -> list[Answer]:
        if weights.source != self._source:
            self._start(weights)
        request = {
            "adapter": weights.adapter,
            "prompts": list(prompts),
            "targets": [asdict(each) for each in targets],
            "seed": seed,
        }
        return [Answer(**each) for each in self._ask(request)]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __del__(self) -> None:
        self.close()

    def _start(self, weights: Weights) -> None:
        self.close()
        script = Path(__file__).parent / "vllm_process.py"
        about = asdict(self.setting) | {"model": weights.source, "dtype": self.setting.precision}
        self._process = subprocess.Popen(
            [self.python, str(script), json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._source = weights.source

    def _ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        assert self._process is not None
        to, back = self._process.stdin, self._process.stdout
        assert to is not None and back is not None
        try:
            to.write(json.dumps(request) + "\n")
            to.flush()
            line = back.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"vLLM ended ({self.python}): {_last_words(self._log)}")
        return json.loads(line)


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").strip().splitlines()[-15:])


def vllm_python(given: str | None) -> str | None:
    """The Python that has vLLM: the one given, this one, or that of `make vllm`; None if there is none."""
    import importlib.util

    if given:
        return given
    if importlib.util.find_spec("vllm"):
        return sys.executable
    beside = Path(".venv-vllm/bin/python")
    return str(beside.absolute()) if beside.exists() else None


def longest_of(config: Any, sampling: Sampling) -> int:
    """Tokens of prompt and answer together that the model and the settings allow."""
    return min(sampling.max_model_len, getattr(config, "max_position_embeddings", None) or sampling.max_model_len)
