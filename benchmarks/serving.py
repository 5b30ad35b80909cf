"""What batching brings a server: requests per second and latencies, `--max_batch 32` against 1.

    python benchmarks/serving.py [--quick]

Two `manta serve` processes on this machine, over one base and one adapter, are up all the time; a fixed number of
clients asks one of them at a time, interleaved A B B A, streaming, half of the requests to the base and half to the
adapter. A client asks again as soon as its answer is whole. The clients run in this process and share the cores.

Results go to benchmarks/results/<date>-serving.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from report import about, publish, where

from served import KEY, base, run_over, runs_flags, serving

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "head_dim": 64,
    "num_attention_heads": 8,
}
TOKENS = 32
ARMS = {"on": "32", "off": "1"}
PERCENTILES = (50, 90, 99)


async def load(url: str, clients: int, requests: int) -> dict[str, Any]:
    """`requests` streamed answers by `clients` at a time: seconds of the whole, and of each answer and first token."""
    numbers = iter(range(requests))
    latencies: list[float] = []
    firsts: list[float] = []
    tokens = 0

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal tokens
        for number in numbers:
            body = {
                "model": ("base", "tuned")[number % 2],
                "prompt": f"{number}: what is the capital of France?",
                "max_tokens": TOKENS,
                "temperature": 0.8,
                "seed": number,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            start, first = time.perf_counter(), None
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter()
                        event = json.loads(line[6:])
                        tokens += (event["usage"] or {}).get("completion_tokens", 0)
            latencies.append(time.perf_counter() - start)
            firsts.append((first or start) - start)

    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "requests": requests, "tokens": tokens, "latency_s": latencies, "first_token_s": firsts}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of an arm as one."""
    seconds = sum(each["seconds"] for each in rounds)
    figures: dict[str, Any] = {
        "requests": sum(each["requests"] for each in rounds),
        "requests_per_s": sum(each["requests"] for each in rounds) / seconds,
        "tokens_per_s": sum(each["tokens"] for each in rounds) / seconds,
        "requests_per_s_of_rounds": [each["requests"] / each["seconds"] for each in rounds],
    }
    for name in ("latency_s", "first_token_s"):
        taken = np.percentile([second for each in rounds for second in each[name]], PERCENTILES)
        figures[name] = {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, taken, strict=True)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="One short round of each arm; writes nothing")
    parser.add_argument("--clients", type=int, default=16, help="At once  [16]")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers end with this process
    order, requests = ("AB", 16) if options.quick else ("ABBA", 48)
    rounds: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    alone: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with TemporaryDirectory(prefix="manta-serving-") as name, ExitStack() as stack:
        folder = Path(name)
        run = run_over(base(folder / "base", **SHAPE), folder / "results" / "tuned", 1)
        up = {arm: serving(*runs_flags([run]), "--max_batch", rows) for arm, rows in ARMS.items()}
        with ThreadPoolExecutor() as pool:  # both start at once
            urls = dict(zip(up, pool.map(lambda server: stack.enter_context(server).url, up.values()), strict=True))
        for url in urls.values():
            asyncio.run(load(url, 4, 8))  # warm
        for letter in order:
            arm = "on" if letter == "A" else "off"
            rounds[arm].append(asyncio.run(load(urls[arm], options.clients, requests)))
            alone[arm].append(asyncio.run(load(urls[arm], 1, requests // 8)))
            print(arm, round(rounds[arm][-1]["seconds"], 2), round(alone[arm][-1]["seconds"], 2), flush=True)
    report = {
        **about("manta-train", "ray", "torch", "transformers", "peft"),
        "model": {**SHAPE, "dtype": "float32"},
        "clients": options.clients,
        "order": order,
        "arms": {arm: summary(rounds[arm]) for arm in ARMS},
        "one_client": {arm: summary(alone[arm]) for arm in ARMS},
    }
    _write(report, not options.quick)


def _write(report: dict[str, Any], to_files: bool) -> None:
    def line(label: str, figures: dict[str, Any]) -> str:
        times = [
            " / ".join(f"{figures[name][f'p{percent}']:.2f}" for percent in PERCENTILES)
            for name in ("latency_s", "first_token_s")
        ]
        throughput = f"{figures['requests_per_s']:.2f} | {figures['tokens_per_s']:.0f}"
        return f"| {label} | {figures['requests']} | {throughput} | {times[0]} | {times[1]} |\n"

    arms, alone = report["arms"], report["one_client"]
    text = (
        f"# What batching brings a server, {report['date']}\n\n{where(report)}; the clients share the "
        f"machine; a model of {report['model']['num_hidden_layers']} layers of {report['model']['hidden_size']}, "
        f"float32, base and one adapter by turns; {TOKENS} tokens an answer, streamed; arms interleaved "
        f"{' '.join(report['order'])}.\n\n"
        "| batching, clients | requests | requests/s | tokens/s | whole answer, s: p50 / p90 / p99 | first token, s: "
        "p50 / p90 / p99 |\n|---|---|---|---|---|---|\n"
        + "".join(line(f"{arm}, {report['clients']}", arms[arm]) for arm in ARMS)
        + "".join(line(f"{arm}, 1", alone[arm]) for arm in ARMS)
        + f"\nWith {report['clients']} clients, batching serves "
        f"{arms['on']['requests_per_s'] / arms['off']['requests_per_s']:.1f} times the requests per second.\n\n"
        "Command: `python benchmarks/serving.py`.\n"
    )
    publish("serving", report, text, to_files)


if __name__ == "__main__":
    main()
