"""A few steps at full length on this machine, in fresh processes: the memory they really take, and how fast they are.

Each process is a worker without Ray: it loads the model, settles what is settled, and lets the same trainer run, on
random tokens that are all trained. Memory is the most the process ever had: its resident set (VmHWM, proc(5)), or what
the driver says of the GPU, which counts what allocators keep as well.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from manta.activations import Recomputed
from manta.config import Config
from manta.errors import UserError
from manta.simulation import Shape

STEPS = 3  # the first one also makes the optimizer's state; the others are timed
_LAST_LINES = 3  # of the output of a process that failed


@dataclass(frozen=True)
class Measured:
    """Of the worker with most: bytes after the imports, with the model loaded, and at most; tokens/s are of all."""

    baseline: int
    loaded: int
    peak: int
    tokens_per_second: float
    step_s: float
    workers: int
    device: str


def probe(config: Config, device: str, workers: int, shape: Shape, what: Recomputed, threads: int = 1) -> Measured:
    """Run `workers` processes here, and return what they measured. `what` is computed again in the backward pass.

    Raises UserError if one of them fails, with what it said last.
    """
    with socket.socket() as free, ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manta-probe-")))
        asked = config.model_copy(
            update={
                "gradient_checkpointing": what, "max_steps": STEPS, "eval_steps": 0, "logging_steps": 1,
                "results_dir": str(folder), "logging_dir": str(folder), "report_to": "none", "use_wandb": False,
                "dataloader_num_workers": 0,
            }
        )  # fmt: skip
        job = {
            "config": asked.to_dict(),
            "device": device,
            "shape": list(shape),
            "recomputed": what,
            "folder": str(folder),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        free.close()
        processes = [_start(folder, rank, workers, port, device, threads) for rank in range(workers)]
        stack.callback(_end, processes)
        _wait(processes, folder)
        found = [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(workers)]
    most = max(found, key=lambda each: each["peak"])
    step_s = max(each["step_s"] for each in found)
    rate = sum(each["tokens"] for each in found) / step_s
    return Measured(most["baseline"], most["loaded"], most["peak"], rate, step_s, workers, most["device"])


def _start(folder: Path, rank: int, workers: int, port: int, device: str, threads: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {  # as Ray Train sets them (ray/train/torch/config.py)
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "ACCELERATE_TORCH_DEVICE": "cpu" if device == "cpu" else f"cuda:{rank}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (folder / f"log-{rank}").open("wb") as log:
        command = [sys.executable, "-m", "manta.probe", str(folder / "job.json")]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all are done. Raises UserError as soon as one fails: the others would wait for it."""
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if any(process.returncode for process in processes):
            break
    for rank, process in enumerate(processes):
        if process.returncode:
            said = (folder / f"log-{rank}").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            killed = "; the system killed it, most likely for memory" if process.returncode == -signal.SIGKILL else ""
            raise UserError(
                f"The probe failed (exit code {process.returncode}{killed}): {' | '.join(said[-_LAST_LINES:])}\n"
                "Choose a smaller batch or model, or leave out --probe."
            )


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process's memory, now, or with VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    return 0


# --- What each process does


def main(job_file: Path) -> None:
    import torch
    import torch.distributed as dist

    from manta import activations, model, spares
    from manta.runs import Run
    from manta.trainer import MantaTrainer, reseed

    job = json.loads(job_file.read_text(encoding="utf-8"))
    config, shape, folder = Config.from_dict(job["config"]), Shape(*job["shape"]), Path(job["folder"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    spares.preload()
    dist.init_process_group("nccl" if job["device"] == "cuda" else "gloo")
    device = torch.device(f"cuda:{rank}" if job["device"] == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    memory = _Watch(device)
    baseline = memory.now()
    dtype = model.compute_dtype(config, model.computes_bfloat16(device.type))
    placement = model.Placement(device, world, 1, dtype)
    reseed(config.seed)
    network = model.build(config, placement)
    model.assert_sharded(network, config, placement)
    layout = model.settle_layout(network, config, placement)
    activations.recompute(network, job["recomputed"])
    loaded = memory.now()
    times: list[float] = []
    trainer = _trainer(MantaTrainer, config, network, placement, shape._replace(layout=layout), Run(folder), times)
    trainer.train()
    found = {
        "baseline": baseline,
        "loaded": loaded,
        "peak": memory.most(),
        "step_s": statistics.median(after - before for before, after in pairwise(times)),
        "tokens": trainer.tokens,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # what is left are threads of process groups, and ending them can wait for ever


def _trainer(
    kind: Any, config: Config, network: Any, placement: Any, shape: Shape, run: Any, times: list[float]
) -> Any:
    import numpy as np
    from transformers import TrainerCallback

    from manta.data.batches import Rows, SampleOrder
    from manta.saver import Saver
    from manta.trainer import training_arguments

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if placement.device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            times.append(time.perf_counter())

    batch = config.per_device_train_batch_size
    length = shape.tokens // batch
    lengths = [length] * batch
    if shape.layout == "padded" and batch > 1:
        lengths[-1] = max(2, length - 1)  # so that there is padding, and a mask
    drawn = np.random.default_rng(config.seed)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    samples = [
        {"input_ids": (ids := drawn.integers(1, vocabulary, size)), "labels": ids.copy(), "row": row}
        for row, size in enumerate(lengths)
    ]
    world = placement.world_size
    micro_batches = config.micro_batches(world)
    return kind(
        model=network,
        args=training_arguments(config, run, placement, -(-micro_batches // world)),
        train_dataset=Rows(samples),
        callbacks=[Clock()],
        order=SampleOrder(batch, batch, micro_batches, config.seed),
        layout=shape.layout,
        run=run,
        saver=Saver(run, 0, None, False, print),
        fingerprint="",
        start_step=0,
    )


class _Watch:
    """Memory of this process, or of the GPU it has to itself."""

    def __init__(self, device: Any):
        self.device = device

    def now(self) -> int:
        import torch

        if self.device.type == "cpu":
            return resident()
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def most(self) -> int:
        import torch

        if self.device.type == "cpu":
            return resident("VmHWM")
        # What is reserved is most at the end: torch's allocator gives nothing back by itself.
        return self.now() - torch.cuda.memory_reserved(self.device) + torch.cuda.max_memory_reserved(self.device)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
