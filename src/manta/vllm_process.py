"""vLLM's side of `manta evaluate --engine vllm`: requests as JSON lines on stdin, answers on stdout.

Run by the Python of an environment that has vLLM and need not have Manta, so it imports nothing of Manta.
Its one argument is JSON: `model` and the fields of `generation.Setting`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    about = json.loads(sys.argv[1])
    # One process, so that it ends with its stdin; and what vLLM prints must not meet the answers.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = load(about)
    numbers: dict[str, int] = {}  # of adapters
    for line in sys.stdin:
        request = json.loads(line)
        if name := request["adapter"]:
            numbers.setdefault(name, len(numbers) + 1)
        answers.write(json.dumps(reply(llm, about, request, numbers.get(name))) + "\n")
        answers.flush()


def load(about: dict[str, Any]) -> Any:
    if about["device"] == "cpu":  # GiB; else most of the memory there is, of which Ray kills the largest user
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM

    more = {}
    if about["device"] == "cuda":
        more = {
            "tensor_parallel_size": about["tensor_parallel_size"],
            "gpu_memory_utilization": about["gpu_memory_utilization"],
        }
    ranks = (8, 16, 32, 64, 128, 256, 320, 512)  # what its kernels have
    return LLM(
        model=about["model"],
        dtype=about["dtype"],
        max_model_len=longest(about),
        trust_remote_code=about["trust_remote_code"],
        enable_lora=True,
        max_lora_rank=next(rank for rank in ranks if rank >= about["most_rank"]),
        enforce_eager=about["device"] == "cpu",
        seed=0,
        **more,
    )


def longest(about: dict[str, Any]) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(about["model"], trust_remote_code=about["trust_remote_code"])
    wanted = about["sampling"]["max_model_len"]
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def reply(llm: Any, about: dict[str, Any], request: dict[str, Any], number: int | None) -> list[dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = about["sampling"]
    lora = LoRARequest(f"adapter-{number}", number, request["adapter"]) if number else None
    drawn = [
        SamplingParams(
            max_tokens=sampling["max_tokens"],
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            stop_token_ids=about["stops"],
            seed=request["seed"] + index,
            detokenize=False,
        )
        for index in range(len(request["prompts"]))
    ]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = llm.generate(prompts, drawn, lora_request=lora, use_tqdm=False)
    scored = score(llm, request["targets"], lora, about["device"])
    found = []
    for output, (loss, count) in zip(outputs, scored, strict=True):
        one = output.outputs[0]
        ids = [token for token in one.token_ids if token not in about["stops"]]
        found.append({"ids": ids, "cut": one.finish_reason == "length", "loss": loss, "scored": count})
    return found


def score(llm: Any, targets: list[dict[str, Any]], lora: Any, device: str) -> list[tuple[float, int]]:
    """The sum of -log p over each target's labelled tokens, and how many these are."""
    from vllm import SamplingParams

    some = [index for index, target in enumerate(targets) if target["input_ids"]]
    found = [(0.0, 0)] * len(targets)
    if not some:
        return found
    prompts = [{"prompt_token_ids": targets[index]["input_ids"]} for index in some]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False)
    # With adapters, vLLM's CPU kernel takes the positions of a prompt for sequences: of one, it broadcasts.
    groups = [[prompt] for prompt in prompts] if device == "cpu" else [prompts]
    outputs = [each for group in groups for each in llm.generate(group, params, lora_request=lora, use_tqdm=False)]
    for index, output in zip(some, outputs, strict=True):
        ids, labels = targets[index]["input_ids"], targets[index]["labels"]
        # The first token has no probability: nothing stands before it.
        terms = [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids)) if labels[i] != -100]
        found[index] = (-sum(terms), len(terms))
    return found


if __name__ == "__main__":
    main()
