"""vLLM under Ray Serve LLM as an `Engine`. Needs `pip install 'ray[llm]'`, and is imported only where it is chosen.

Prompts go to vLLM as token ids, so that templates, limits and stop tokens are the same for both engines. Adapters are
named to vLLM at start: Ray's own loading of them wants an object store.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from manta.serving.catalog import Weights
from manta.serving.generation import Delta, EngineError, Request


def engine_kwargs(weights: Weights, plan: Any) -> dict[str, Any]:
    """vLLM's own settings for these weights (see vLLM's engine arguments)."""
    kwargs: dict[str, Any] = {
        "trust_remote_code": weights.trust_remote_code,
        "max_num_seqs": plan.max_batch,
        "dtype": plan.dtype,
    }
    if plan.settings.max_model_len:
        kwargs["max_model_len"] = plan.settings.max_model_len
    if weights.adapters:
        ranks = [_rank(folder) for folder in weights.adapters.values()]
        kwargs |= {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": _as_vllm_has_it(max(ranks))}
    return kwargs


def deployment(weights: Weights, plan: Any, number: int, at_once: int) -> Any:
    """The Ray Serve LLM deployment of these weights, with every adapter under its model's name."""
    from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
    from ray.serve.llm import LLMConfig, build_llm_deployment
    from ray.serve.llm.deployment import LLMServer

    class Server(LLMServer):
        async def __init__(self, llm_config: Any, adapters: dict[str, str]) -> None:  # type: ignore[misc]
            await super().__init__(llm_config)
            for place, (name, folder) in enumerate(adapters.items(), start=1):
                engine: Any = self.engine
                await engine.resolve_lora(
                    DiskMultiplexConfig(
                        model_id=name, max_total_tokens=None, local_path=folder, lora_assigned_int_id=place
                    )
                )

        async def stats(self) -> dict[str, float]:
            await self.check_health()
            return {}

    base = next((model.name for model in weights.models if not model.adapter), weights.source)
    config = LLMConfig(
        model_loading_config={"model_id": base, "model_source": weights.source},
        engine_kwargs=engine_kwargs(weights, plan),
        deployment_config={"num_replicas": 1, "max_ongoing_requests": at_once},
    )
    return build_llm_deployment(
        config,
        name_prefix=f"vllm-{number}-",
        bind_kwargs={"adapters": weights.adapters},
        deployment_cls=Server,
    )


def asked(request: Request) -> dict[str, Any]:
    """A request as vLLM's own /v1/completions takes it."""
    rule = request.sampling
    return {
        "model": request.model,
        "prompt": request.prompt,
        "max_tokens": rule.max_tokens,
        "temperature": rule.temperature,
        "top_p": rule.top_p,
        "top_k": rule.top_k or -1,
        "seed": rule.seed,
        "stop": list(rule.stop),
        "stop_token_ids": sorted(request.stop_ids),
        "add_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


class VllmEngine:
    """An `Engine` behind the handle of a deployment of Ray Serve LLM."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        from ray.exceptions import RayError, TaskCancelledError
        from ray.serve.llm.openai_api_models import CompletionRequest

        answer = self._handle.options(stream=True).completions.remote(CompletionRequest(**asked(request)))
        told = 0
        try:
            async for events in answer:
                for delta, total in deltas(events):
                    yield Delta(delta.text, max(0, total - told), delta.finish)
                    told = max(told, total)
        except TaskCancelledError as error:
            raise asyncio.CancelledError from error
        except RayError as error:
            raise EngineError(str(error).strip().splitlines()[-1]) from error
        finally:
            answer.cancel()

    async def stats(self) -> dict[str, float]:
        return await self._handle.stats.remote()


def deltas(events: Any) -> list[tuple[Delta, int]]:
    """(what was added, tokens of the answer so far) of one event or a list of them. Raises EngineError on an error.

    Events are text as it goes over the wire ("data: {…}"), several of them at times, or an error as an object.
    """
    found = []
    for event in events if isinstance(events, list) else [events]:
        if not isinstance(event, str):
            raise EngineError(str(getattr(getattr(event, "error", event), "message", event)))
        for line in event.splitlines():
            body = line.removeprefix("data:").strip()
            if not body or body == "[DONE]":
                continue
            told = json.loads(body)
            if "error" in told:
                raise EngineError(str(told["error"].get("message", told["error"])))
            total = (told.get("usage") or {}).get("completion_tokens", 0)
            found += [(Delta(c["text"], 0, c.get("finish_reason")), total) for c in told.get("choices", ())]
    return found


def _rank(folder: str) -> int:
    from peft import PeftConfig

    return int(PeftConfig.from_pretrained(folder).r)


def _as_vllm_has_it(rank: int) -> int:
    """The least rank that vLLM knows and that is enough."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)
