"""Answers of several models to the same rows, by actors on Ray, kept as they come so that a kill costs a batch."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manta import storage
from manta.config import Config
from manta.data.tokenize import Encoder, Rendered, fit, stop_tokens
from manta.errors import UserError
from manta.generation import Answer, Engine, HfEngine, Sampling, Setting, Target, VllmEngine, Weights, longest_of


@dataclass(frozen=True)
class Row:
    """One row to answer. An empty `prompt` is not answered: it fills the model, or is empty by itself."""

    prompt: list[int]
    target: Target


@dataclass(frozen=True)
class Model:
    """A model by its name in the report; `identity` changes with its weights."""

    name: str
    weights: Weights
    identity: str


def setting(config: Config, tokenizer: Any, sampling: Sampling, device: str, dtype: str = "auto") -> Setting:
    """How the models of a run answer."""
    return Setting(
        stops=tuple(tokenizer.convert_tokens_to_ids(stop_tokens(config.hf_model_id, tokenizer))),
        pad=tokenizer.pad_token_id,
        sampling=sampling,
        dtype=dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )


def as_rows(rows: Sequence[dict[str, Any]], tokenizer: Any, config: Config, sampling: Sampling) -> list[Row]:
    """Prepared rows as ids: each prompt, or none if it leaves no room for an answer, and each reference cut to what the
    model may see."""
    from transformers import AutoConfig

    about = AutoConfig.from_pretrained(config.hf_model_id, trust_remote_code=config.trust_remote_code)
    limit = longest_of(about, sampling)
    encoder = Encoder(tokenizer)
    found = []
    for row in rows:  # one by one: a mixture has rows of both kinds
        chat = "messages" in row  # a conversation's prompt holds its special tokens already
        prompt: Any = tokenizer(row["input"], add_special_tokens=not chat, verbose=False)["input_ids"]
        text = row["input"] + row["output"] + (row.get("end", "") if chat else "")
        sample = encoder.encode([Rendered(text, ((len(row["input"]), len(text)),), chat)])[0]
        scored = [piece for piece in fit(sample, min(config.max_seq_length, limit), "truncate") if piece.trains]
        target = Target(scored[0].input_ids, scored[0].labels) if scored else Target([], [])
        found.append(Row(prompt if 0 < len(prompt) < limit else [], target))
    return found


class Answerer:
    """The actor: one engine, on the CPUs or GPUs that Ray gave it."""

    def __init__(self, setting: Setting, vllm: str | None):
        self.engine: Engine = VllmEngine(setting, vllm) if vllm else HfEngine(setting)

    def answer(self, weights: Weights, rows: Sequence[Row], seed: int) -> list[Answer]:
        """What is on an object store is fetched to this node first."""
        here = Weights(str(_here(weights.source)), _here(weights.adapter))
        found = [Answer([], False, 0.0, 0)] * len(rows)
        some = [index for index, row in enumerate(rows) if row.prompt]
        if some:
            prompts, targets = [rows[index].prompt for index in some], [rows[index].target for index in some]
            for index, answer in zip(some, self.engine.answer(here, prompts, targets, seed), strict=True):
                found[index] = answer
        return found


def collect(
    models: Sequence[Model],
    rows: Sequence[Row],
    setting: Setting,
    vllm: str | None,
    batch_size: int,
    seed: int,
    kept: Path,
    workers: int,
    told: Callable[[str, int], None],
) -> dict[str, list[Answer]]:
    """All models' answers, in the order of `rows`. `kept` is a folder on this node, in which a batch that is there is
    not asked for again; `told` hears the model's name and how many rows are done. Ray is up.

    Batches hold rows of like length, and the same ones at every start, so that an answer does not depend on a kill.
    """
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].prompt), index))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    kept.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Answer]] = {}
    files = {model.name: kept / f"{_key(model, rows, setting, batch_size, seed, vllm)}.jsonl" for model in models}
    done = {name: _read(file) for name, file in files.items()}
    missing = [(model, number) for model in models for number in range(len(batches)) if number not in done[model.name]]
    for model in models:
        told(model.name, sum(len(batches[number]) for number in done[model.name]))
    for model, number, answers in _ask(missing, batches, rows, setting, vllm, seed, workers):
        with files[model.name].open("a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": number, "answers": [asdict(each) for each in answers]}) + "\n")
        done[model.name][number] = answers
        told(model.name, len(answers))
    for model in models:
        answers = [Answer([], False, 0.0, 0)] * len(rows)
        for number, batch in enumerate(batches):
            for index, answer in zip(batch, done[model.name][number], strict=True):
                answers[index] = answer
        found[model.name] = answers
    return found


def _ask(
    missing: list[tuple[Model, int]],
    batches: list[list[int]],
    rows: Sequence[Row],
    setting: Setting,
    vllm: str | None,
    seed: int,
    workers: int,
) -> Iterator[tuple[Model, int, list[Answer]]]:
    """(model, batch, answers) of each missing batch as it comes; each actor gets one batch at a time."""
    import ray

    if not missing:
        return
    on_gpu = setting.device == "cuda"
    cpus = max((int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]), default=1)
    each = 1 if on_gpu else max(1, cpus // workers)
    variables = {"OMP_NUM_THREADS": str(each), "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    actor: Any = ray.remote(Answerer).options(
        num_gpus=setting.tensor_parallel_size if on_gpu else 0,
        num_cpus=each,
        runtime_env={"env_vars": variables},
        max_restarts=2,
        max_task_retries=2,
    )
    actors = [actor.remote(setting, vllm) for _ in range(min(workers, len(missing)))]
    free, waiting, running = list(actors), deque(missing), dict[Any, tuple[Any, Model, int]]()
    try:
        while waiting or running:
            while free and waiting:
                model, number = waiting.popleft()
                chosen = free.pop()
                reply = chosen.answer.remote(model.weights, [rows[i] for i in batches[number]], seed + number)
                running[reply] = (chosen, model, number)
            ready, _ = ray.wait(list(running))
            chosen, model, number = running.pop(ready[0])
            yield model, number, _result(ready[0])
            free.append(chosen)
    finally:
        for each in actors:
            ray.kill(each)


def _result(reply: Any) -> list[Answer]:
    """Raises UserError with what the actor said, where another start would only repeat it."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reply)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        if isinstance(cause, MemoryError) or "out of memory" in str(cause).lower():
            raise UserError(
                f"No memory for a batch of answers: {cause}. Lower --batch_size or --max_tokens."
            ) from error
        raise


def _here(name: str | None) -> str | None:
    """A folder inside a closed one, on this node; a hub's name and None as they are."""
    if name is None or not storage.is_remote(name):
        return name
    folder = storage.place(name)
    return str(storage.fetch(folder.parent) / folder.name)


def _key(model: Model, rows: Sequence[Row], setting: Setting, batch_size: int, seed: int, vllm: str | None) -> str:
    """What answers depend on; where and by how many actors they are drawn is not among it."""
    parts = [model.identity, asdict(setting), batch_size, seed, bool(vllm), [asdict(row) for row in rows]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[int, list[Answer]]:
    """Batches that are whole: a kill may have cut the last line."""
    found: dict[int, list[Answer]] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                batch = json.loads(line)
            except ValueError:
                continue
            found[batch["batch"]] = [Answer(**each) for each in batch["answers"]]
    return found
