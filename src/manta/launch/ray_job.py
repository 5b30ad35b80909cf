"""A run as a job of a Ray cluster that is there already, by Ray's Jobs API: the driver runs on the cluster, too.

Variables go to the driver and to all workers by the job's runtime environment, which Ray keeps and shows: a secret has
no place there. It is set on the cluster's own hosts before `ray start`; whether it is there, the job says at its start.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from typing import Any

from manta.config import Config
from manta.errors import UserError
from manta.launch import job
from manta.launch.config import LaunchConfig
from manta.launch.rendered import Files

FILE = "ray-job.json"


def render(config: Config, launch: LaunchConfig) -> Files:
    """What Ray's JobSubmissionClient is given. Workers are as the recipe says, else as the cluster has GPUs."""
    config = config.model_copy(update={"run_name": config.run_name or job.default_name(config)})
    checks = [f': "${{{name}:?is not set on the Ray hosts}}"' for name in launch.secrets if name != "RAY_AUTH_TOKEN"]
    runtime: dict[str, Any] = {"env_vars": job.environment(launch)}
    if launch.ray.working_dir:
        runtime["working_dir"] = launch.ray.working_dir
    submission = {
        "entrypoint": " && ".join([*checks, job.shell(config, launch, "--ray_address", "auto")]),
        "entrypoint_num_cpus": launch.ray.driver_cpus,
        "runtime_env": runtime,
        "metadata": {"run": config.run_name},
    }
    return {FILE: json.dumps(submission, indent=2, ensure_ascii=False) + "\n"}


def submit(files: Files, launch: LaunchConfig) -> str:
    """Raises UserError if there is no cluster, or it refuses."""
    address = launch.ray.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address or not re.match(r"https?://", address):
        raise UserError("Which cluster? --address http://HEAD:8265, the address of its dashboard.")
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        number = client.submit_job(**json.loads(files[FILE]))
    except (ConnectionError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The Ray cluster at {address} did not take the job: {reason} Start it with a dashboard (`ray start "
            "--head`), and set RAY_AUTH_MODE and RAY_AUTH_TOKEN as there."
        ) from error
    return f"{number}\nFollow it: ray job logs --address {shlex.quote(address)} --follow {number}"
