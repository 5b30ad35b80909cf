"""The guide's comparison, as far as it can be measured here: Accelerate's launcher and Manta on Ray Train.

    python benchmarks/frameworks.py

Both fine-tune the same tiny model on the same rows with two workers on CPU, save every 20 steps, and get SIGKILL to the
worker of rank 1 after step 30. Looked at: whether training goes on by itself; if not, what the same command does; how
many steps are done again; and which rows the next step takes with one worker instead of two. The Accelerate arm is
transformers' Trainer under `accelerate launch`, with resume_from_checkpoint where there is a checkpoint. Lightning is
not installed with Manta and not measured. Results go to benchmarks/results/<date>-frameworks.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RESULTS = Path(__file__).parent / "results"
STEPS, SAVE, KILL_AFTER = 90, 20, 30
BATCH, ACCUMULATION = 2, 2


def stock(folder: Path) -> None:
    """What each process of `accelerate launch` runs: each step, with the rows that this rank took, is a line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    rank = int(os.environ.get("RANK", "0"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    samples = [tokenizer(row["question"] + row["answer"])["input_ids"] for row in rows]
    taken: list[int] = []

    def collate(batch: list[int]) -> dict[str, torch.Tensor]:
        taken.extend(batch)
        longest = max(len(samples[index]) for index in batch)
        ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        for row, index in enumerate(batch):
            ids[row, : len(samples[index])] = torch.tensor(samples[index])
        return {"input_ids": ids, "labels": ids}

    class Lines(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            line = {
                "step": state.global_step,
                "rank": rank,
                "rows": list(taken),
                "pid": os.getpid(),
                "time": time.time(),
            }
            taken.clear()
            with (folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            time.sleep(0.1)

    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=STEPS, save_steps=SAVE, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION, use_cpu=True, report_to="none", disable_tqdm=True, seed=1,
        remove_unused_columns=False, dataloader_num_workers=0, save_total_limit=2,
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "base"),
        args=arguments,
        train_dataset=list(range(len(samples))),
        data_collator=collate,
        callbacks=[Lines()],
    )
    trainer.train(resume_from_checkpoint=bool(list((folder / "out").glob("checkpoint-*"))))


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def launch(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", str(workers)]
    command += ["--multi_cpu"] if workers > 1 else []
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1", "--main_process_port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        script = [str(Path(__file__).resolve()), "--stock", str(folder)]
        return subprocess.Popen([*command, *script], stdout=log, stderr=log, env=environment)


def wait(process: subprocess.Popen[bytes], folder: Path, step: int, after: float = 0.0) -> bool:
    """Whether a step after `step` was done, by lines newer than `after`, before the end or 180 s."""
    limit = time.time() + 180
    while time.time() < limit:
        if any(line["step"] >= step and line["time"] > after for line in lines(folder)):
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.2)
    return False


def rows_of(found: list[dict[str, Any]], step: int) -> list[int]:
    return sorted(row for line in found if line["step"] == step for row in line["rows"])


def accelerate(folder: Path) -> dict[str, Any]:
    undisturbed = folder / "undisturbed"
    hurt = folder / "hurt"
    for each in (undisturbed, hurt):
        prepare(each)
    launch(undisturbed, 2).wait(300)
    whole = lines(undisturbed)
    process = launch(hurt, 2)
    assert wait(process, hurt, KILL_AFTER), (hurt / "log").read_text()[-2000:]
    victim = next(line["pid"] for line in reversed(lines(hurt)) if line["rank"] == 1)
    os.kill(victim, signal.SIGKILL)
    killed = time.time()
    done = max(line["step"] for line in lines(hurt))
    by_itself = wait(process, hurt, 1, after=killed + 3)
    code = None
    if not by_itself:
        code = process.wait(60)
    else:
        end(process)
    again = launch(hurt, 1)
    assert wait(again, hurt, 1, after=killed + 3), (hurt / "log").read_text()[-2000:]
    time.sleep(3)
    end(again)
    after = [line for line in lines(hurt) if line["time"] > killed + 3]
    first = min(line["step"] for line in after)
    return {
        "by_itself": by_itself,
        "exit_code": code,
        "steps_done_again": done - first + 1,
        "rows_with_one_worker": rows_of(after, first),
        "rows_undisturbed": rows_of(whole, first),
        "same_rows": rows_of(after, first) == rows_of(whole, first),
    }


def manta(folder: Path) -> dict[str, Any]:
    """Two workers, one is killed; then the driver is ended and the same run goes on with one worker."""
    from manta import ledger
    from manta.runs import Run
    from running import small_config

    folder.mkdir()
    settings = {"max_steps": STEPS, "save_steps": SAVE, "eval_steps": 0, "gradient_accumulation_steps": ACCUMULATION}
    undisturbed = small_config(folder, run_name="undisturbed", **settings)
    hurt = small_config(folder, run_name="hurt", **settings)
    whole, run = Run(folder / "results" / "undisturbed"), Run(folder / "results" / "hurt")

    def command(config: Any, name: str) -> list[str]:
        (folder / f"{name}.yaml").write_text(config.dump())
        return [sys.executable, "-m", "manta", "train", "--config", str(folder / f"{name}.yaml")]

    subprocess.run(command(undisturbed, "undisturbed"), check=True, capture_output=True)
    process = subprocess.Popen(command(hurt, "hurt"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def step() -> int:
        found = (
            [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
            if run.metrics_file.exists()
            else []
        )
        return max((line["step"] for line in found if "loss" in line), default=0)

    limit = time.time() + 180
    while step() < KILL_AFTER and time.time() < limit:
        time.sleep(0.05)
    os.kill(run.events()[0]["workers"][1]["pid"], signal.SIGKILL)
    while len(run.world_sizes()) < 2 and time.time() < limit and process.poll() is None:
        time.sleep(0.05)
    by_itself = len(run.world_sizes()) == 2
    second = [event for event in run.events() if event["kind"] == "attempt"][-1]["step"]
    done = max(json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines() if '"attempt": 1' in line)
    process.terminate()
    process.wait(120)
    stopped = run.latest()
    assert stopped is not None
    one = small_config(folder, run_name="hurt", **{**settings, "num_workers": 1})
    subprocess.run(command(one, "one"), check=True, capture_output=True)
    ours, theirs = ledger.read(run.ledger, STEPS), ledger.read(whole.ledger, STEPS)
    return {
        "by_itself": by_itself,
        "exit_code": None,
        "steps_done_again": done - second,
        "same_rows": ours == theirs,
        "world_sizes": run.world_sizes(),
    }


def prepare(folder: Path) -> None:
    from running import write_rows
    from tiny import tiny_model

    folder.mkdir(parents=True)
    write_rows(folder / "rows.jsonl")
    tiny_model(folder / "base")


def end(process: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in family:
        each.kill()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--stock", type=Path, help="The other arm's train function; for this script's own use")
    given = parser.parse_args()
    if given.stock:
        stock(given.stock)
        return
    with tempfile.TemporaryDirectory(prefix="manta-frameworks-") as folder:
        found = {"accelerate": accelerate(Path(folder) / "accelerate"), "manta": manta(Path(folder) / "manta")}
    date = datetime.date.today().isoformat()

    def says(arm: str) -> list[str]:
        about = found[arm]
        ended = "goes on by itself" if about["by_itself"] else f"everything ends, exit code {about['exit_code']}"
        rows = "the rows that an undisturbed run takes" if about["same_rows"] else "other rows than an undisturbed run"
        return [ended, str(about["steps_done_again"]), rows]

    asked = ["after SIGKILL to one of two workers", "steps done again", "afterwards with one worker, a step takes"]
    table = ["| measured | Accelerate's launcher, transformers' Trainer | Manta on Ray Train |", "|---|---|---|"]
    table += [
        f"| {what} | {theirs} | {ours} |"
        for what, theirs, ours in zip(asked, says("accelerate"), says("manta"), strict=True)
    ]
    text = [
        f"# Frameworks, {date}",
        "",
        *table,
        "",
        "Lightning: not measured. Command: `python benchmarks/frameworks.py`.",
    ]
    (RESULTS / f"{date}-frameworks.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / f"{date}-frameworks.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
