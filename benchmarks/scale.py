"""What larger clusters would cost, by paper, and what the driver itself costs with more workers, measured.

    python benchmarks/scale.py [--steps 200]

The paper part is a model of step time, traffic and memory per GPU with FSDP (`FULL_SHARD`) and HSDP (`HYBRID_SHARD`)
on 8, 64 and 512 GPUs. It has one free number for each published setting, how fast the kernels are (fitted on the
smallest number of GPUs), and is then held against the same authors' figures for more GPUs. The measured part runs 2,
4, 8 and 16 light workers on this machine against the real mailbox, monitor and supervisor. Results go to
benchmarks/results/<date>-scale.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """`flops`: peak of one GPU in bf16; `inside` and `between`: bytes/s of one GPU within a host and to others.

    A collective reaches `share` of these; `hop_s` is what each further host adds to one (ring).
    """

    name: str
    flops: float
    inside: float
    between: float
    memory: float
    gpus: int = 8
    share: float = 0.8
    hop_s: float = 10e-6


@dataclass(frozen=True)
class Model:
    """`adapters`: trained parameters of LoRA, 0 where every weight is trained."""

    name: str
    parameters: float
    layers: int
    width: int
    vocabulary: int
    adapters: float = 0


@dataclass(frozen=True)
class Job:
    """`tokens` of a micro-batch on a GPU, in sequences of `length`; `recompute`: share of the forward done again."""

    tokens: int
    length: int
    micro_batches: int = 1
    recompute: float = 1.0
    kernels: float = 0.5
    hybrid: bool = False


def flops_per_token(model: Model, job: Job) -> float:
    """Of the hardware. A frozen weight has no gradient of its own: 4 instead of 6 FLOP per parameter and token."""
    forward = 2 * model.parameters + 4 * model.layers * model.width * job.length
    backward = 2 * forward - (2 * model.parameters if model.adapters else 0)
    return forward * (1 + job.recompute) + backward


def traffic(model: Model, job: Job, gpus: int, machine: Machine) -> dict[str, float]:
    """Bytes of one GPU in a step, over its links within the host and its network card, and a micro-batch's seconds.

    FSDP gathers the weights (bf16) for forward and backward, and reduce-scatters gradients (float32) of what is
    trained. A ring over several hosts enters each of them once, and there is a ring for each card: so a card takes an
    8th of what a GPU receives, the links within the host all of it. HSDP does these within a host, and all-reduces a
    GPU's shard of the gradients between hosts.
    """
    hosts, cards = max(1, gpus // machine.gpus), min(gpus, machine.gpus)
    group = cards if job.hybrid else gpus
    sharded = 2 * 2 * model.parameters * (group - 1) / group
    if model.adapters:  # replicated on each GPU, all-reduced by all
        all_reduced = 2 * 4 * model.adapters * (gpus - 1) / gpus
        inside, between = sharded + all_reduced, all_reduced / cards
    else:
        sharded += 4 * model.parameters * (group - 1) / group
        inside = sharded
        between = 2 * 4 * model.parameters / group * (hosts - 1) / hosts if job.hybrid else 0.0
    between += 0.0 if job.hybrid else sharded / cards
    between = between if hosts > 1 else 0.0
    collectives = model.layers * (1 if job.hybrid else 3) * (hosts - 1)
    seconds = max(inside / machine.inside, between / machine.between) / machine.share + collectives * machine.hop_s
    return {"inside": inside * job.micro_batches, "between": between * job.micro_batches, "seconds": seconds}


def step_seconds(model: Model, job: Job, gpus: int, machine: Machine) -> float:
    """Compute and traffic overlap, but for the first layer's gather and the last one's reduction."""
    compute = job.tokens * flops_per_token(model, job) / (machine.flops * job.kernels)
    network = traffic(model, job, gpus, machine)["seconds"]
    return job.micro_batches * (max(compute, network) + network / model.layers)


def tokens_per_second(model: Model, job: Job, gpus: int, machine: Machine) -> float:
    """Of one GPU."""
    return job.tokens * job.micro_batches / step_seconds(model, job, gpus, machine)


def states_gib(model: Model, job: Job, gpus: int, machine: Machine) -> float:
    """Weights, gradients and AdamW's state on one GPU: float32 of what is trained, bf16 of what is frozen."""
    shards = min(gpus, machine.gpus) if job.hybrid else gpus
    if model.adapters:
        return (2 * model.parameters / shards + 16 * model.adapters) / GIB
    return 16 * model.parameters / shards / GIB


def memory_gib(model: Model, job: Job, gpus: int, machine: Machine) -> float:
    """States, two gathered layers, activations (kept at layers' ends, one layer's inside), logits in float32."""
    layer = model.parameters / model.layers
    activations = job.tokens * model.width * (2 * model.layers + 34)
    logits = 4 * job.tokens * model.vocabulary * 2
    return states_gib(model, job, gpus, machine) + (2 * 2 * layer + activations + logits) / GIB


H100_TITAN = Machine("H100, 400 Gb/s per GPU", 989e12, 450e9, 50e9, 96)
H100 = replace(H100_TITAN, name="H100 (p5: 3,200 Gb/s per host)", memory=80)
A100_40 = Machine("A100 40 GB, 1,600 Gb/s per host", 312e12, 300e9, 25e9, 40)
LLAMA_8B = Model("Llama 3.1 8B", 8.03e9, 32, 4096, 128256)
QWEN_8B = Model("Qwen3-8B", 8.19e9, 36, 4096, 151936)
LLAMA_70B = Model("Llama 3.1 70B", 70.6e9, 80, 8192, 128256)
MPT_7B, MPT_13B = Model("MPT-7B", 6.66e9, 32, 4096, 50432), Model("MPT-13B", 12.85e9, 40, 5120, 50432)
FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md"
TITAN = "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md"

# Tokens per second and GPU, as published; the smallest number of GPUs fits the kernels' speed, the others check.
PUBLISHED: list[tuple[str, Model, Job, Machine, dict[int, float]]] = [
    (FOUNDRY, MPT_7B, Job(18 * 2048, 2048), A100_40, {16: 3645, 32: 3725, 64: 3665, 128: 3623}),
    (FOUNDRY, MPT_13B, Job(16 * 2048, 2048), A100_40, {32: 1998, 64: 1976, 128: 1972}),
    (FOUNDRY, MPT_13B, Job(2 * 2048, 2048, recompute=0), H100, {8: 4792, 16: 4767, 32: 4811, 64: 4800}),
    (TITAN, LLAMA_8B, Job(2 * 8192, 8192, recompute=0.2), H100_TITAN, {8: 5762, 128: 5605}),
    (TITAN + ", torch.compile", LLAMA_8B, Job(2 * 8192, 8192, recompute=0.2), H100_TITAN, {8: 6667, 128: 6514}),
]


def fitted(model: Model, job: Job, gpus: int, machine: Machine, published: float) -> Job:
    """The job with the kernels' speed that gives the published figure, by bisection."""
    low, high = 0.01, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        slower = tokens_per_second(model, replace(job, kernels=middle), gpus, machine) < published
        low, high = (middle, high) if slower else (low, middle)
    return replace(job, kernels=low)


def check() -> list[dict[str, Any]]:
    rows = []
    for source, model, job, machine, figures in PUBLISHED:
        smallest = min(figures)
        known = fitted(model, job, smallest, machine, figures[smallest])
        for gpus, published in figures.items():
            ours = tokens_per_second(model, known, gpus, machine)
            about = {"model": model.name, "machine": machine.name, "gpus": gpus, "published": published}
            off = round(ours / published - 1, 4)
            rows.append({**about, "ours": round(ours), "off": off, "fitted": gpus == smallest, "source": source})
    return rows


def check_memory() -> dict[str, float]:
    """The published peak with and without sharding 16 times further; all else is equal, so the states make it up."""
    job = Job(2 * 8192, 8192)
    ours = states_gib(LLAMA_8B, job, 8, H100_TITAN) - states_gib(LLAMA_8B, job, 128, H100_TITAN)
    return {"published": 82.4 - 67.0, "compiled": 77.0 - 62.0, "ours": round(ours, 1)}


def scale() -> list[dict[str, Any]]:
    """What the guide's model and a larger one would cost on p5 instances; kernels as fast as torchtitan's, compiled."""
    kernels = fitted(LLAMA_8B, PUBLISHED[4][2], 8, H100_TITAN, 6667).kernels
    lora = replace(QWEN_8B, name="Qwen3-8B, LoRA", adapters=87e6)
    rows = []
    for model, tokens in ((lora, 4 * 4096), (QWEN_8B, 4 * 4096), (LLAMA_70B, 2 * 4096)):
        for gpus in (8, 64, 512):
            for hybrid in (False, True):
                job = Job(tokens, 4096, kernels=kernels, hybrid=hybrid)
                moved = traffic(model, job, gpus, H100)
                memory = memory_gib(model, job, gpus, H100)
                rows.append(
                    {
                        "model": model.name,
                        "gpus": gpus,
                        "sharding": "HYBRID_SHARD" if hybrid else "FULL_SHARD",
                        "step_s": round(step_seconds(model, job, gpus, H100), 2),
                        "tokens_per_gpu": round(tokens_per_second(model, job, gpus, H100)),
                        "network_s": round(moved["seconds"], 2),
                        "inside_gb": round(moved["inside"] / 1e9, 1),
                        "between_gb": round(moved["between"] / 1e9, 1),
                        "memory_gib": round(memory, 1),
                        "fits": memory < 0.9 * H100.memory,
                    }
                )
    return rows


def light(config: dict[str, Any]) -> dict[str, Any]:
    """A train function that does what Manta's does around a step, and no training."""
    import ray
    from ray import train

    from manta.progress import find_mailbox

    context = train.get_context()
    rank = context.get_world_rank()
    mailbox: Any = find_mailbox(config["mailbox"])
    if rank == 0:
        workers = [{"node_id": ray.get_runtime_context().get_node_id()}] * context.get_world_size()
        ray.get(mailbox.begin_attempt.remote(0, workers))
        mailbox.entered_loop.remote()
    asked, begun = None, time.perf_counter()
    for step in range(1, config["steps"] + 1):
        time.sleep(config["step_s"])
        mailbox.put.remote({"kind": "step", "step": step, "rank": rank, "tokens": 100})
        if rank == 0 and step % 10 == 0:
            mailbox.put.remote({"kind": "log", "step": step, "attempt": 1, "loss": 1.0})
        if asked is not None:  # one step ahead; every rank asks here, of Manta's only the first
            ray.get(asked)
        asked = mailbox.wanted.remote()
    return {"seconds": time.perf_counter() - begun}


def measure(workers: int, steps: int, step_s: float) -> dict[str, Any]:
    """One run of light workers under the real mailbox, monitor, display and supervisor."""
    import psutil
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from rich.console import Console

    from manta.attempts import Attempts, Policy
    from manta.controller import Supervisor
    from manta.progress import Display, Monitor, open_mailbox
    from manta.runs import Run
    from manta.status import Status

    mailbox, name = open_mailbox(Attempts(Policy(2, 2, 1, halve=True)))
    actor = psutil.Process(ray.get(mailbox.__ray_call__.remote(lambda self: os.getpid())))

    def used() -> tuple[float, float]:
        there = actor.cpu_times()
        return time.process_time(), there.user + there.system

    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as null:
        console = Console(file=null)
        with (
            Display("scale", status := Status("scale", max_steps=steps), console) as display,
            Monitor(mailbox, Run(Path(folder)), status, display) as monitor,
        ):
            samples: list[tuple[float, float]] = []

            def sample() -> None:  # from the first step to the last one: starting is another matter
                for reached in (1, workers * steps):
                    while monitor.tokens // 100 < reached:
                        time.sleep(0.05)
                    samples.append(used())

            watch = threading.Thread(target=sample, daemon=True)
            watch.start()
            began = time.perf_counter()
            result = DataParallelTrainer(
                light,
                train_loop_config={"mailbox": name, "steps": steps, "step_s": step_s},
                scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
                run_config=RunConfig(name="scale", storage_path=folder, callbacks=[Supervisor(name)]),
            ).fit()
            wall = time.perf_counter() - began
            watch.join(30)
        seconds, count = result.return_value["seconds"], monitor.tokens // 100
    assert count == workers * steps, (count, workers, steps)
    (driver_before, mailbox_before), (driver_after, mailbox_after) = samples
    return {
        "workers": workers,
        "steps": steps,
        "step_ms": round(1000 * seconds / steps, 2),
        "driver_cpu_ms_per_step": round(1000 * (driver_after - driver_before) / steps, 3),
        "mailbox_cpu_ms_per_step": round(1000 * (mailbox_after - mailbox_before) / steps, 3),
        "around_s": round(wall - seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step_s", type=float, default=0.2, help="What a light step sleeps")
    parser.add_argument("--paper", action="store_true", help="No measurement")
    given = parser.parse_args()
    found: dict[str, Any] = {"check": check(), "memory": check_memory(), "scale": scale(), "driver": []}
    if not given.paper:
        import ray

        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        for workers in (2, 4, 8, 16):
            found["driver"].append(measure(workers, given.steps, given.step_s))
            print(found["driver"][-1], file=sys.stderr)
        ray.shutdown()
    about = {"step_s": given.step_s, "machine": platform.machine(), "cores": os.cpu_count()}
    write({**found, **about, "assumptions": [asdict(each) for each in (H100, A100_40)]})


def write(found: dict[str, Any]) -> None:
    date = datetime.date.today().isoformat()
    far = max(abs(row["off"]) for row in found["check"] if not row["fitted"])
    memory = found["memory"]
    lines = [
        f"# Scale, {date}",
        "",
        "## By paper, held against published figures",
        "",
        "Tokens per second and GPU. The smallest number of GPUs of each setting fits how fast kernels are; the others "
        f"are the check: off by at most {far:.1%}. In all of these the traffic hides behind computing, so they check "
        "that it does, and not how long it takes where it does not. What the model leaves out (stragglers, jitter) is "
        f"what it is too fast by. Sharding Llama 3.1 8B over 128 GPUs instead of 8 saves {memory['ours']} GiB by the "
        f"model, and saved {memory['published']:.1f} GiB ({memory['compiled']:.1f} compiled) as published.",
        "",
        "| model | machine | GPUs | published | model | off | source |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['model']} | {row['machine']} | {row['gpus']} | {row['published']:,} | {row['ours']:,} "
            f"| {'fitted' if row['fitted'] else format(row['off'], '+.1%')} | {row['source']} |"
            for row in found["check"]
        ),
        "",
        "## By paper: 8, 64 and 512 H100 (p5), 4,096 tokens per sequence, activations recomputed",
        "",
        "Nothing of this table was measured. Traffic is per GPU and step, one micro-batch: within a host and between "
        "hosts; it overlaps with computing, so it costs where it takes longer than that.",
        "",
        "| model | GPUs | sharding | step, s | traffic, s | in a host, GB | between, GB | tok/s per GPU | GiB "
        "| fits 80 GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['model']} | {row['gpus']} | {row['sharding']} | {row['step_s']} | {row['network_s']} "
            f"| {row['inside_gb']} | {row['between_gb']} | {row['tokens_per_gpu']:,} | {row['memory_gib']} "
            f"| {'yes' if row['fits'] else 'no'} |"
            for row in found["scale"]
        ),
    ]
    if found["driver"]:
        lines += [
            "",
            f"## Measured: the driver with more workers ({found['cores']} cores, {found['machine']})",
            "",
            f"Light workers that sleep {1000 * found['step_s']:g} ms a step and tell the mailbox what Manta's tell it; "
            "all on this machine, so that they also share its cores.",
            "",
            "| workers | step, ms | driver, CPU ms/step | mailbox, CPU ms/step | start and end, s |",
            "|---|---|---|---|---|",
            *(
                f"| {row['workers']} | {row['step_ms']} | {row['driver_cpu_ms_per_step']} "
                f"| {row['mailbox_cpu_ms_per_step']} | {row['around_s']} |"
                for row in found["driver"]
            ),
        ]
    lines += ["", "Command: `python benchmarks/scale.py`."]
    (RESULTS / f"{date}-scale.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / f"{date}-scale.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
