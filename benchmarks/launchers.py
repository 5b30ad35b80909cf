"""Manta, Ray Train alone, HF Accelerate and PyTorch Lightning: the start of a run, and what a killed worker costs.

    make peers && python benchmarks/launchers.py [--quick]

All train every weight of the same small model on the same tokens, on two CPU processes with gloo, import what Manta's
workers do (`manta.imports`), and save every 20 steps in the usual way of each. The order is A B C D D C B A. In
each run the process of rank 1 gets SIGKILL ten steps after a save; who watches gives the same command again as soon as
the first one has ended, if it has. Results go to benchmarks/results/<date>-launchers.{json,md}.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from report import about, publish, where

from faults.bench import Bench
from faults.job import Job, kill_marked, marks
from manta.imports import OF_WORKERS
from running import lines, prepared_of

SAVE, BATCH = 20, 4
SETTLED_S = 45  # from the first step to the kill, at least: by then Manta's spares are ready, as hours later
HANGS_S = 120  # seconds after which a command that has not ended is said to hang
PEERS = Path(__file__).parents[1] / ".peers"  # of `make peers`: what training itself does not need


# --- The other arms' scripts, as their documentation shows them


def loader_of(data: str, base: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    for name in OF_WORKERS:
        importlib.import_module(name)
    rows = [torch.tensor(row) for row in json.loads(Path(data).read_text())]

    def collate(batch: list[Any]) -> dict[str, Any]:
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=collate)
    return AutoModelForCausalLM.from_pretrained(base), loader


def tell(folder: str, rank: int, step: int) -> None:
    with Path(folder, f"rank{rank}.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "pid": os.getpid(), "rank": rank, "step": step}) + "\n")


def accelerate(folder: str, base: str, data: str) -> None:
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, loader = loader_of(data, base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = 0
    if saved := sorted(Path(folder).glob("state-*")):
        accelerator.load_state(str(saved[-1]))
        step = int(saved[-1].name.removeprefix("state-"))
    while True:
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            tell(folder, accelerator.process_index, step)
            if step % SAVE == 0:
                accelerator.save_state(f"{folder}/state-{step:06d}")


def lightning(folder: str, base: str, data: str) -> None:
    import lightning
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loader = loader_of(data, base)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def on_train_batch_end(self, *args: Any) -> None:
            tell(folder, self.global_rank, self.global_step)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    module.train()
    saving = ModelCheckpoint(folder, every_n_train_steps=SAVE, save_last=True)
    last = Path(folder, "last.ckpt")
    lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=100_000, max_epochs=-1, callbacks=[saving],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, module.loader, ckpt_path=str(last) if last.exists() else None)  # fmt: skip


def ray_train(folder: str, base: str, data: str) -> None:
    import ray
    from ray import train
    from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model

    def loop() -> None:
        import torch

        model, loader = loader_of(data, base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = 0
        if saved := train.get_checkpoint():
            with saved.as_directory() as path:
                state = torch.load(f"{path}/state.pt")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
        rank = train.get_context().get_world_rank()
        model, loader = prepare_model(model), prepare_data_loader(loader)
        while True:
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                tell(folder, rank, step)
                if step % SAVE == 0:
                    with tempfile.TemporaryDirectory() as path:
                        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                        torch.save(state, f"{path}/state.pt")
                        train.report({}, checkpoint=train.Checkpoint(path) if rank == 0 else None)

    ray.init("local", num_cpus=2, include_dashboard=False)
    TorchTrainer(
        loop,
        scaling_config=train.ScalingConfig(num_workers=2),
        run_config=train.RunConfig(storage_path=folder, failure_config=train.FailureConfig(max_failures=3)),
    ).fit()


# --- What is looked at


class Peer:
    """A run of another launcher; `steps` are its lines of rank 0."""

    def __init__(self, bench: Bench, kind: str, number: int):
        config = bench.config("full")
        self.folder = bench.folder / f"{kind}{number}"
        self.folder.mkdir()
        data = self.folder / "data.json"
        data.write_text(json.dumps([row["input_ids"] for row in prepared_of(config).tokenized("training")]))
        script = [__file__, "--peer", kind, str(self.folder), config.hf_model_id, str(data)]
        # `--multi_gpu` has it start processes, which the script puts on CPUs; with `--cpu` it would want MPI.
        launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        self.command = [*(launch if kind == "accelerate" else [sys.executable]), *script]
        quiet = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **quiet, **marks(str(self.folder)), "PYTHONPATH": str(PEERS)}

    def start(self) -> None:
        with (self.folder / "out").open("ab") as output:
            self.driver = subprocess.Popen(self.command, env=self.environment, stdout=output, stderr=output)

    def steps(self) -> list[dict[str, Any]]:
        return lines(self.folder / "rank0.jsonl")

    def victim(self) -> int:
        return lines(self.folder / "rank1.jsonl")[-1]["pid"]

    def said(self) -> str:
        return (self.folder / "out").read_text(errors="replace")[-2000:]

    def close(self) -> None:
        kill_marked(str(self.folder))


class Manta:
    def __init__(self, bench: Bench, kind: str, number: int):
        settings = {"save_steps": SAVE, "max_steps": 100_000, "logging_steps": 1, "gradient_accumulation_steps": 1}
        more = {"per_device_train_batch_size": BATCH, "eval_steps": 0}
        self.job = Job(bench.config("full", run_name=f"manta{number}", **settings, **more), bench.folder)

    def start(self) -> None:
        self.job.start()
        self.driver: Any = self.job.driver

    def steps(self) -> list[dict[str, Any]]:
        return [{**line, "pid": line["attempt"]} for line in self.job.losses()]

    def victim(self) -> int:
        return self.job.worker(1)

    def said(self) -> str:
        return self.job.said()

    def close(self) -> None:
        self.job.__exit__()


PEER = {"Ray Train alone": "ray", "HF Accelerate": "accelerate", "Lightning": "lightning"}
ARMS = {"Manta on Ray Train": (Manta, ""), **{name: (Peer, kind) for name, kind in PEER.items()}}


def measure(run: Any) -> dict[str, Any]:
    """Start, kill, and wait for the first new step, giving the command again if it takes that."""
    began = time.time()
    run.start()
    until(run, lambda: run.steps())
    found: dict[str, Any] = {"start_s": run.steps()[0]["time"] - began}
    time.sleep(SETTLED_S)
    until(run, lambda: run.steps()[-1]["step"] % SAVE == SAVE // 2)
    before = run.steps()[-1]
    psutil.Process(run.victim()).kill()
    killed = time.time()
    new: list[dict[str, Any]] = []
    found["commands"] = 0
    while not new:
        if run.driver.poll() is not None and not found["commands"]:
            found |= {"ended_s": time.time() - killed, "code": run.driver.returncode, "commands": 1}
            run.start()
        elif not found["commands"] and time.time() > killed + HANGS_S:
            return found | {"hangs": True}
        new = [step for step in run.steps() if step["pid"] != before["pid"]]
        time.sleep(0.05)
    done = max(step["step"] for step in run.steps() if step["pid"] == before["pid"])
    return found | {"recovery_s": new[0]["time"] - killed, "wasted_steps": done - new[0]["step"] + 1}


def until(run: Any, what: Any, limit: float = 240) -> None:
    end = time.monotonic() + limit
    while not what():
        if run.driver.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"it does not run: {run.said()}")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each arm once, nothing written")
    options = parser.parse_args()
    if not PEERS.exists():
        raise SystemExit("Lightning is not here: make peers")
    sys.path.append(str(PEERS))
    report = about("ray", "torch", "transformers", "accelerate", "lightning")
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="manta-launchers-") as name:
        bench = Bench(Path(name))
        prepared = bench.config("full")
        from manta.data import prepare

        folder, parts = prepare.locate(prepared)
        if not prepare.is_ready(folder):
            prepare.prepare(prepared, folder, parts, prepare.open_job(prepared, folder), here=True)
        for number, arm in enumerate([*ARMS, *([] if options.quick else reversed(ARMS))]):
            kind, peer = ARMS[arm]
            run = kind(bench, peer, number)
            try:
                found[arm].append(measure(run))
            finally:
                run.close()
            print(arm, found[arm][-1], file=sys.stderr, flush=True)
    report["runs"] = found
    publish("launchers", report, told(report), to_files=not options.quick)


def told(report: dict[str, Any]) -> str:
    lines = [
        f"# The start of a run, and a killed worker, {report['date']}",
        "",
        f"Two CPU processes, a small model; {where(report)}. `make peers && python benchmarks/launchers.py`, whose "
        "text says what is measured; medians of the runs.",
        "",
        "| | command to first step | after kill -9 of one worker | kill to first new step | steps done again |",
        "|---|---|---|---|---|",
    ]
    for arm, runs in report["runs"].items():
        start = statistics.median(run["start_s"] for run in runs)
        if any("hangs" in run for run in runs):
            lines.append(f"| {arm} | {start:.1f} s | hangs for over {HANGS_S} s | | |")
            continue
        again = [run for run in runs if run["commands"]]
        ended = statistics.median(run["ended_s"] for run in again) if again else 0
        what = f"the command ends after {ended:.1f} s, and is given again" if again else "goes on by itself"
        recovery = statistics.median(run["recovery_s"] for run in runs)
        wasted = ", ".join(str(run["wasted_steps"]) for run in runs)
        lines.append(f"| {arm} | {start:.1f} s | {what} | {recovery:.1f} s | {wasted} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        {"ray": ray_train, "accelerate": accelerate, "lightning": lightning}[sys.argv[2]](*sys.argv[3:])
    else:
        main()
