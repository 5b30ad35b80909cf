"""A worker whose own code waits for ever, as a deadlock does: its process lives and answers, its loop does not."""

from __future__ import annotations

import json
from pathlib import Path

from faults.bench import Bench, tiny_model_once
from faults.job import Job

HANG = "one rank skips a collective (hang)"
CODE = '''
import time
from pathlib import Path
import torch.distributed as dist
from transformers import Qwen3ForCausalLM

class StuckForCausalLM(Qwen3ForCausalLM):
    """Rank 1 stays away from the step, once, after the file `stick` has appeared beside the weights."""

    def forward(self, *args, **kwargs):
        stick = Path(FOLDER) / "stick"
        if dist.is_initialized() and dist.get_rank() == 1 and stick.exists():
            stick.unlink()
            while True:
                time.sleep(1)
        return super().forward(*args, **kwargs)
'''


def stuck_model(folder: Path) -> str:
    """The tiny model with code of its own beside it."""
    tiny_model_once(folder)
    (folder / "modeling_stuck.py").write_text(CODE.replace("FOLDER", repr(str(folder))))
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_stuck.StuckForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def stuck(bench: Bench) -> None:
    base = Path(stuck_model(bench.folder / "stuck"))
    settings = {"hf_model_id": str(base), "trust_remote_code": True, "step_timeout_s": 15, "stop_at_step": 40}
    with bench.job("stuck", **settings) as job, bench.row(HANG, "rank 1 waits for ever in its forward pass") as row:
        job.ensure_running()
        job.steps_more(5)
        (base / "stick").touch()
        step = job.until(lambda: not (base / "stick").exists() and job.losses()[-1], 30)
        row.wasted_steps, row.seconds_to_new_step = job.recovery(step["time"], 120)
        row.must(row.wasted_steps <= 1, f"{row.wasted_steps} wasted steps")
        row.must([event["cause"] for event in job.events("failure")] == ["hang"], f"{job.events('failure')}")
        row.must(all("forward" in log for log in _logs(job)), "no stacks of every worker in its log")
        job.finish()
        bench.compare(job, [row], weights=None)


def _logs(job: Job) -> list[str]:
    return [path.read_text(errors="replace") for path in sorted(job.run.logs.glob("worker-*.log"))]
