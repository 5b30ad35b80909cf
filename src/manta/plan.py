"""What a run would need and take, before anything of it is paid for: no weight is loaded, no worker started.

Parameters and shapes come from the model's config; what is chosen, and what memory that needs, from the same code as in
a worker (`memory`); steps and tokens from the data (`workload`).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manta import accelerators, architecture, cluster, fit, memory, model, probe, runs, spares, storage, workload
from manta.accelerators import USABLE
from manta.config import Config
from manta.errors import UserError
from manta.model import Placement

GIB = 2**30
MFU = 0.35  # of the published peak that a run is taken to reach; benchmarks/gpu.py measures it
RAY = int(1.7 * GIB)  # driver, Ray's processes and actors of one run: the sum of their Pss, seen with Ray 2.60
CUDA_CONTEXT = 0.8 * GIB  # CUDA's context, cuBLAS and NCCL: taken for granted, not measured here


@dataclass(frozen=True)
class Place:
    """Where a worker would be: `room` are the bytes that it may have, of its GPU, or its part of a node's memory."""

    name: str
    device: str
    room: int
    workers: int
    nodes: int = 1
    flops: float | None = None
    bfloat16: bool = True

    def placement(self, config: Config) -> Placement:
        dtype = model.compute_dtype(config, self.bfloat16)
        return Placement(torch.device(self.device), self.workers, self.nodes, dtype)


def plan(config: Config, names: str | None = None, mfu: float = MFU, probed: bool = False) -> dict[str, Any]:
    """Everything as plain values, bytes and seconds; `names` are accelerators to compare, `probed` measures here.

    Raises UserError for whatever `manta train` would refuse before it starts a worker.
    """
    from manta.preparation import absolute

    others = accelerators.find(names) if names else {}
    config = absolute(config)
    cluster.check_device_before_start(config)
    architecture.check(config)
    spares.preload()
    framework = probe.resident()
    here = _here(config, framework)
    nominal = config.nominal_workers or (config.worker_range or (here.workers,))[-1]
    config = config.model_copy(update={"device": here.device, "nominal_workers": nominal})
    work = workload.of(config)
    bare = architecture.skeleton(config)
    mine = _Planned(config, here, work, bare, framework)
    found = mine.described()
    measured = None
    if probed:
        measured = _probe(mine)
        found["probe"] = {
            **asdict(measured), "estimate": mine.expected(), "ratio": round(mine.expected() / measured.peak, 3)
        }  # fmt: skip
    found["time"] = mine.time(mfu, measured)
    found["disk"] = _disk(config, bare, mine)
    found["remedies"] = _remedies(mine) if found["fits"] is False else []
    found["accelerators"] = [
        _compared(config, Place(name, "cuda", int(USABLE * each.memory * GIB), here.workers, here.nodes, each.flops),
                  work, bare, mfu)
        for name, each in others.items()
    ]  # fmt: skip
    return found


class _Planned:
    """One config at one place: what is chosen there, and what it needs."""

    def __init__(self, config: Config, place: Place, work: workload.Workload, bare: Any, framework: int):
        self.config, self.place, self.work, self.bare = config, place, work, bare
        self.placement = place.placement(config)
        self.framework = framework if place.device == "cpu" else int(CUDA_CONTEXT)
        self.attention = model.attention_of(config, place.device, bare)
        self.layout = model.usual_layout(self.attention, config)
        batch = config.per_device_train_batch_size
        known = work.source == "prepared" and not config.packing
        lengths = work.lengths if known else np.full(batch, config.max_seq_length)
        self.shape = memory.largest(lengths, batch, self.layout)
        room = place.room - self.framework
        self.settled = fit.settle(config, self.placement, self.shape, fit.Room(room, room))
        self.memory = self.settled.needed or memory.estimate(
            self.settled.config, self.placement, self.shape, self.settled.recomputed
        )

    def expected(self) -> int:
        """The most that a worker has in a step, without a checkpoint being written."""
        if self.memory is None:
            return 0
        return self.framework + (self.memory.resident if self.place.device == "cpu" else self.memory.step)

    @property
    def spare(self) -> int:
        """The process that is kept started for a restart of this worker."""
        return self.framework if self.config.spare_workers and self.place.device == "cpu" else 0

    @property
    def total(self) -> int:
        return self.expected() + self.spare + (self.memory.copies if self.memory else 0)

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.total <= self.place.room

    def described(self) -> dict[str, Any]:
        """What was found out about model, choices, memory and work."""
        network = memory.bare_network(self.config, self.placement, self.shape)
        base = sum(each.numel() for each in self.bare.parameters())
        trainable = sum(each.numel() for each in network.parameters() if each.requires_grad)
        parts = asdict(self.memory) if self.memory else {}
        runtime = self.expected() - self.framework - self.memory.step if self.memory else 0
        return {
            "model": self.config.hf_model_id,
            "parameters": base,
            "trainable": trainable,
            "training": "full" if self.config.full_ft else "LoRA",
            "place": asdict(self.place),
            "chosen": {
                "dtype": str(self.placement.dtype).removeprefix("torch."),
                "sharding_strategy": self.settled.config.sharding_strategy,
                "attention": self.attention,
                "layout": self.layout,
                "gradient_checkpointing": self.settled.recomputed,
                "why": self.settled.why,
            },
            "micro_batch": {"rows": self.config.per_device_train_batch_size, "tokens": self.shape.tokens},
            "memory": {
                "framework": self.framework,
                **parts,
                "runtime": runtime,
                "spare": self.spare,
                "total": self.total,
            },
            "fits": self.fits,
            "work": {
                "from": self.work.source,
                "sequences": self.work.sequences,
                "mean_tokens": round(float(self.work.lengths.mean()), 1),
                "steps": self.work.steps,
                "tokens_per_step": self.work.tokens_per_step,
                "tokens": self.work.tokens,
            },
        }

    def time(self, mfu: float, measured: probe.Measured | None = None) -> dict[str, Any]:
        """Tokens/s and hours, from the best that is known: measured now, measured before, or the published peak."""
        rate, source = None, "nothing was measured: --probe does"
        if measured is not None:
            rate = measured.tokens_per_second * self.place.workers / measured.workers
            source = f"measured by the probe on {measured.workers}"
        elif (before := workload.earlier_throughput(self.config, self.place.workers)) is not None:
            rate, source = before
        elif self.place.flops:
            rate, source = self.published_rate(mfu), f"{mfu:.0%} of the published peak, taken for granted"
        hours = self.work.tokens / rate / 3600 if rate else None
        return {"tokens_per_second": rate and round(rate, 1), "hours": hours and _figures(hours), "from": source}

    def published_rate(self, mfu: float) -> float:
        flops = workload.flops_per_token(self.config, self.bare, self.work.seen, self.settled.recomputed)
        return mfu * (self.place.flops or 0) * self.place.workers / flops


def _figures(number: float) -> float:
    """Four of them."""
    return float(f"{number:.4g}")


def _here(config: Config, framework: int) -> Place:
    """This machine, or the cluster that is joined. Raises UserError as `manta train` does if it has no room."""
    import os

    if config.ray_address or os.environ.get("RAY_ADDRESS"):
        with cluster.connected(config):
            return _on_cluster(config)
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    fewest, _ = config.worker_range or (gpus or 1, gpus or 1)
    if gpus:
        name, room = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        known = accelerators.of_device(name, room)
        native = model.computes_bfloat16("cuda")
        return Place(name, "cuda", int(0.97 * room), fewest, 1, known and known.flops, native)
    one = Placement(torch.device("cpu"), fewest)
    free = fit.free_bytes(one) + (framework - RAY) // fewest  # this process's own goes with it
    return Place("this machine's CPU", "cpu", free, fewest, bfloat16=model.computes_bfloat16("cpu"))


def _on_cluster(config: Config) -> Place:
    on = cluster.device(config)
    fewest, _ = cluster.workers(config, on)
    cluster.check_fits(fewest, cluster.resources_per_worker(config, on), config.placement_strategy)
    nodes = [node["Resources"] for node in cluster.living_nodes()]
    if on == "cuda":
        nodes = [node for node in nodes if node.get("GPU")]
        kinds = {key.removeprefix("accelerator_type:") for node in nodes for key in node if "accelerator_type:" in key}
        found = [(each, kind) for kind in sorted(kinds) if (each := accelerators.of_device(kind, 0))]
        if not found:
            raise UserError(f"The cluster's GPUs {sorted(kinds)} are not known; name some with --accelerators.")
        least, name = min(found)
        return Place(name, on, int(USABLE * least.memory * GIB), fewest, min(fewest, len(nodes)), least.flops)
    hosts = min(fewest, len(nodes))
    each = min(node.get("memory", 0) for node in nodes) * hosts / fewest
    name = f"the cluster's CPUs ({len(nodes)} nodes)"
    return Place(name, on, int(each), fewest, hosts, bfloat16=model.computes_bfloat16("cpu"))


def _probe(mine: _Planned) -> probe.Measured:
    room = torch.cuda.device_count() if mine.place.device == "cuda" else mine.place.workers
    workers = min(mine.place.workers, max(1, room))
    threads = max(1, int(cluster.resources_per_worker(mine.config, mine.place.device).get("CPU", 1)))
    return probe.probe(mine.settled.config, mine.place.device, workers, mine.shape, mine.settled.recomputed, threads)


def _compared(config: Config, place: Place, work: workload.Workload, bare: Any, mfu: float) -> dict[str, Any]:
    """One row of the table of accelerators."""
    there = _Planned(config.model_copy(update={"device": "cuda"}), place, work, bare, 0)
    rate = there.published_rate(mfu)
    return {
        "name": place.name,
        "room": place.room,
        "dtype": str(there.placement.dtype).removeprefix("torch."),
        "gradient_checkpointing": there.settled.recomputed,
        "needs": there.total,
        "fits": there.fits,
        "tokens_per_second": round(rate, 1),
        "mfu": mfu,
        "hours": _figures(work.tokens / rate / 3600),
    }


def _disk(config: Config, bare: Any, mine: _Planned) -> dict[str, Any]:
    """Checkpoints that are there at once: the best, the newest, and one that is being written."""
    network = memory.bare_network(config, mine.placement, mine.shape)
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    # What FSDP does not divide, every worker writes.
    state = trained * memory.optimizer_bytes(config) * (1 if config.full_ft else mine.place.workers)
    one = int(4 * trained + state)
    at_once = min(config.save_total_limit + 2, -(-mine.work.steps // config.save_steps) + 1)
    merged = sum(each.numel() for each in bare.parameters()) * (4 if config.full_ft else 2)
    free = None
    if not storage.is_remote(storage.place(config.results_dir)):
        folder = Path(config.results_dir)
        free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    return {
        "weights": 4 * trained,
        "optimizer": int(state),
        "checkpoint": one,
        "at_once": at_once,
        "run": one * at_once,
        "export": merged,
        "free": free,
        "fits": None if free is None else one * at_once <= free,
        "folder": str(runs.of(config).path),
    }


def _remedies(mine: _Planned) -> list[dict[str, Any]]:
    """What would need less, one change at a time, with what is needed then."""
    config, place = mine.config, mine.place
    changes: list[tuple[str, dict[str, Any], int]] = []
    if mine.settled.recomputed != "full":
        changes.append(("--gradient_checkpointing full", {"gradient_checkpointing": "full"}, 1))
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch > 1:
        flags = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation * batch}
        changes.append((" ".join(f"--{name} {value}" for name, value in flags.items()), flags, 1))
    if config.max_seq_length > 256:
        half = config.max_seq_length // 2
        changes.append((f"--max_seq_length {half}", {"max_seq_length": half}, 1))
    if config.full_ft:
        changes.append(("--full_ft False (LoRA)", {"full_ft": False}, 1))
    elsewhere = "" if place.device == "cuda" else ", on nodes of their own"
    changes += [(f"--num_workers {place.workers * more}{elsewhere}", {}, more) for more in (2, 4)]
    found = []
    for told, update, more in changes:
        there = replace(place, workers=place.workers * more)
        work = mine.work
        if "max_seq_length" in update:
            work = workload.shortened(work, update["max_seq_length"])
        tried = _Planned(config.model_copy(update=update), there, work, mine.bare, mine.framework)
        if tried.total < mine.total:
            found.append({"change": told, "needs": tried.total, "fits": tried.fits})
    return found
