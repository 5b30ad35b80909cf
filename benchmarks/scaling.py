"""From one worker with both cores to two with one each, beside Accelerate and Lightning with two processes.

    make peers && python benchmarks/scaling.py [--steps 8] [--dtype auto] [--quick]

The model, the data and the LoRA of training.py, 8 samples a step in all arms. Manta as `manta train` runs it:
one worker, then two, each with a whole base since it is frozen and fits, and two with FSDP; the others with DDP and
padding to the longest row, as their examples have it. Order A B C … C B A; real tokens per second between the ends of
steps, the first two left out. Results go to benchmarks/results/<date>-scaling.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import about, publish, where
from training import BATCH, DATA, RANK, RATE, SEED, TARGETS, WARM_UP, chosen, make_model, rate, run_manta, write_data

TWO = {"num_workers": 2, "resources_per_worker": {"CPU": 1}, "per_device_train_batch_size": BATCH // 2}
PEERS = Path(__file__).parents[1] / ".peers"  # of `make peers`
WORKERS = {
    "Manta, 1 worker of 2 cores": {},
    "Manta, 2 workers of 1 core": TWO,
    "Manta, 2 workers of 1 core, FULL_SHARD": {**TWO, "sharding_strategy": "FULL_SHARD"},
}
LIBRARIES = {"Accelerate, 2 processes": "accelerate", "Lightning, 2 processes": "lightning"}


def run_library(folder: Path, library: str, options: argparse.Namespace, number: int) -> dict[str, Any]:
    job = {
        "model": str(folder / "model"), "tokens": str(folder / "alpaca-tokens.jsonl"), "steps": options.steps,
        "report": str(folder / f"{library}-{number}.json"), "batch": BATCH // 2, "rank": RANK, "targets": TARGETS,
        "seed": SEED, "learning_rate": RATE, "dtype": options.dtype, "full_ft": False, "dropout": 0.0,
    }  # fmt: skip
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PEERS)}
    # Of several processes on CPUs, `accelerate launch` leaves the start to MPI, or to torchrun as here.
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if library == "accelerate" else []
    command = [sys.executable, *launch, Path(__file__).with_name("peers.py"), library, path]
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(Path(job["report"]).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--quick", action="store_true", help="a model of two layers, each arm once, nothing written")
    options = parser.parse_args()
    options.full_ft, options.dropout, options.dtype = False, 0.0, chosen(options.dtype)
    options.warm_up = WARM_UP
    if not DATA.exists():
        raise SystemExit(f"the data to train on is not at {DATA}")
    libraries = LIBRARIES if PEERS.exists() else {}
    if not libraries:
        print("Without Accelerate and Lightning: make peers brings them.", file=sys.stderr)
    report = about("torch", "transformers", "peft", "accelerate", "ray")
    arms = [*WORKERS, *libraries]
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory(prefix="manta-bench-", dir="/tmp") as name:
        folder = Path(name)
        make_model(folder / "model", options.quick)
        write_data(folder, "alpaca", options)
        for arm in [*arms, *([] if options.quick else reversed(arms))]:
            number = len(runs[arm])
            if arm in WORKERS:
                runs[arm].append(run_manta(folder, "alpaca", arm, options, number, WORKERS[arm]))
            else:
                runs[arm].append(run_library(folder, libraries[arm], options, number))
            print(f"{arm}: {rate(runs[arm][-1]):,.0f} tok/s", file=sys.stderr, flush=True)
    report |= {"runs": runs, "dtype": options.dtype}
    publish("scaling", report, told(report), to_files=not options.quick)


def told(report: dict[str, Any]) -> str:
    rates = {arm: statistics.median(map(rate, runs)) for arm, runs in report["runs"].items()}
    one = rates[next(iter(WORKERS))]
    lines = [
        f"# One worker and two, {report['date']}",
        "",
        f"LoRA, {report['dtype']}, alpaca's demo, {BATCH} samples a step; {where(report)}. `python benchmarks/"
        f"scaling.py {shlex.join(sys.argv[1:])}`, with the peers of `make peers` where they are.",
        "",
        "| | real tok/s | of one worker |",
        "|---|---|---|",
        *(f"| {arm} | {value:,.0f} | {value / one:.2f} |" for arm, value in rates.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
