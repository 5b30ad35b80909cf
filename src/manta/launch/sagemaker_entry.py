"""The entry point of a training job's containers: python -m manta.launch.sagemaker_entry

It is the container's first process, so that SIGTERM reaches it. It reads what SageMaker put below /opt/ml, joins the
hosts into one Ray, runs the driver on the first of them, and leaves the merged model where SageMaker takes it.
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from manta import storage
from manta.config import Config
from manta.errors import UserError
from manta.launch import rendezvous, supervise
from manta.launch.rendezvous import Hosts
from manta.launch.supervise import Outcome, Stop, say
from manta.manifest import write_text
from manta.recipe import nested
from manta.runs import default_name

ROOT = "MANTA_SAGEMAKER_ROOT"
SECRET = "MANTA_SECRET_"
# What a channel of this name is to Manta, whatever the hyperparameters say.
_CHANNELS = {"train": "hfdc_dataset_name", "training": "hfdc_dataset_name", "model": "hf_model_id"}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: that of the driver; 1 or 2 with the reason in output/failure; a host that followed ends with 0."""
    parser = argparse.ArgumentParser(description="Entry point of a SageMaker training container.")
    parser.add_argument("mode", nargs="?", help="What SageMaker passes to an image without an entry point of the job")
    parser.add_argument("--root", type=Path, default=Path(os.environ.get(ROOT, "/opt/ml")))
    parser.add_argument("--join_timeout", type=float, default=900, help="Seconds to wait for a host")
    parser.add_argument("--no_export", action="store_true", help="Leave the checkpoints as they are")
    given = parser.parse_args(arguments)
    stop = Stop()
    try:
        outcome = run(given.root, given.join_timeout, not given.no_export, stop)
    except UserError as error:
        outcome = Outcome(2, f"manta: {error}")
        say(str(error))
    if outcome.failure:
        supervise.write_failure(given.root / "output" / "failure", outcome.failure)
    return outcome.code


def run(root: Path, timeout_s: float, export: bool, stop: Stop) -> Outcome:
    """One host's part of the job. Raises UserError."""
    resources = _read(root, "resourceconfig")
    hosts = Hosts(
        rendezvous.ordered(resources["hosts"]),
        resources["current_host"],
        timeout_s,
        resources.get("network_interface_name"),
    )
    config = settings(root, len(hosts.names))
    names = resolve_secrets(os.environ)
    job = os.environ.get("TRAINING_JOB_ARN") or os.environ.get("TRAINING_JOB_NAME", "")
    rendezvous.set_ray_token(os.environ, job, len(hosts.names), bool(os.environ.get("MANTA_OPEN_RAY")))
    rendezvous.set_interface(os.environ, hosts.interface)
    if not hosts.lead:
        return supervise.follow(hosts, stop)
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        write_text(recipe, config.dump())

        def driver(address: str) -> list[str]:
            return [sys.executable, "-m", "manta", "train", "--config", str(recipe), "--ray_address", address]

        fewest, most = config.worker_range or (1, 1)
        hidden = rendezvous.secret_values(os.environ, names)
        outcome = supervise.lead(hosts, driver, stop, fewest < most, hidden)
    if outcome.code == 0 and export:
        return _export(config, Path(os.environ.get("SM_MODEL_DIR", root / "model")))
    return outcome


def settings(root: Path, hosts: int) -> Config:
    """The run's config: hyperparameters, with channels for data and base model. Raises UserError."""
    flags = {
        name: decoded(value)
        for name, value in _read(root, "hyperparameters").items()
        if not name.startswith(("sagemaker_", "_"))  # those of SageMaker's own toolkits
    }
    channels = _read(root, "inputdataconfig")
    for channel, flag in _CHANNELS.items():
        if channel in channels:
            flags[flag] = str(root / "input" / "data" / channel)
    given = nested(flags)
    if "results_dir" not in given and hosts == 1:
        given["results_dir"] = str(root / "checkpoints")
    config = Config.from_dict(given)
    if hosts > 1 and not storage.is_remote(config.results_dir):
        raise UserError(
            f"results_dir {config.results_dir} is a disk of one of {hosts} hosts. Set the hyperparameter "
            "results_dir to s3://bucket/runs: every host writes its part of a checkpoint there."
        )
    return config.model_copy(update={"run_name": config.run_name or default_name(config)})


def decoded(value: Any) -> Any:
    """A hyperparameter: SageMaker's estimators write JSON, boto3's users plain text."""
    try:
        found = json.loads(value)
    except (TypeError, ValueError):
        return value
    return found if isinstance(found, str) else value


def resolve_secrets(environ: MutableMapping[str, str]) -> list[str]:
    """Put the values of MANTA_SECRET_<NAME>=name[#key] of AWS Secrets Manager into <NAME>; returns these names.

    Raises UserError, which never holds a value.
    """
    names = [name.removeprefix(SECRET) for name in environ if name.startswith(SECRET)]
    if not names:
        return []
    import boto3

    client = boto3.client("secretsmanager", region_name=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION"))
    for name in names:
        secret, _, key = environ[f"{SECRET}{name}"].partition("#")
        try:
            value = client.get_secret_value(SecretId=secret)["SecretString"]
            environ[name] = json.loads(value)[key] if key else value
        except Exception as error:  # of the client, or of a secret without the key
            what = type(error).__name__ if isinstance(error, ValueError | KeyError) else str(error)
            raise UserError(
                f"{name}: {secret} of Secrets Manager cannot be read ({what}). Check its name and key, and that the "
                "job's role may secretsmanager:GetSecretValue."
            ) from None
    return names


def _export(config: Config, model: Path) -> Outcome:
    """The merged model, into a folder that SageMaker made: a mount, so files are moved and it is not."""
    model.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=model.parent))
    run = f"{config.results_dir.rstrip('/')}/{config.run_name}"
    command = [sys.executable, "-m", "manta", "convert", "--run", run, "--output_dir", str(staging / "model")]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            return Outcome(
                done.returncode, f"The run has finished, and its model was not written: {done.stderr[-800:]}"
            )
        for file in sorted((staging / "model").iterdir(), key=lambda file: file.name == "manifest.json"):
            shutil.move(str(file), model / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"the model is in {model}")
    return Outcome(0)


def _read(root: Path, name: str) -> dict[str, Any]:
    """One of SageMaker's files. Raises UserError if it is there and not JSON, or missing where it must be there."""
    path = root / "input" / "config" / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if name == "resourceconfig":
            raise UserError(f"{path} is missing: this is the entry point of a SageMaker container.") from error
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
