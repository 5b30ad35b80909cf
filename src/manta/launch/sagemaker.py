"""A run as a training job of SageMaker: the request that boto3 is given, which `--dry_run` shows as it is.

The recipe becomes hyperparameters, one for each setting that differs from its default, as in the guide's estimator.
The container's entry point is `sagemaker_entry`. Checkpoints go straight to S3.
"""

from __future__ import annotations

import json
import time
from typing import Any

from manta.config import Config
from manta.errors import UserError
from manta.launch import job
from manta.launch.config import LaunchConfig
from manta.launch.instances import INSTANCES
from manta.launch.rendered import Files
from manta.launch.sagemaker_api import call, check

FILE = "training-job.json"
LONGEST_NAME = 63
CHECKPOINTS = "/opt/ml/checkpoints"
CHANNELS = "/opt/ml/input/data"
ENTRY = ["python", "-m", "manta.launch.sagemaker_entry"]
SECRET = "MANTA_SECRET_"  # the reference of a secret, before the variable's name
OPEN = "MANTA_OPEN_RAY"
_MOST = 100  # hyperparameters, and variables


def render(config: Config, launch: LaunchConfig) -> Files:
    """The request. Raises UserError for what SageMaker would refuse, or what the job would not find."""
    request = training_job(config, launch)
    check("create_training_job", request)
    return {FILE: json.dumps(request, indent=2, ensure_ascii=False) + "\n"}


def submit(files: Files, launch: LaunchConfig) -> str:
    request = json.loads(files[FILE])
    arn = call("create_training_job", request, launch.sagemaker.region)["TrainingJobArn"]
    stream = f"--log-stream-name-prefix {request['TrainingJobName']}"
    return f"{arn}\nFollow it: aws logs tail /aws/sagemaker/TrainingJobs --follow {stream}"


def training_job(config: Config, launch: LaunchConfig) -> dict[str, Any]:
    settings = launch.sagemaker
    fewest, most = launch.node_range
    if fewest != most:
        raise UserError(f"A training job has a fixed number of instances: set --nodes {fewest} or {most}.")
    groups = settings.groups(most)
    nodes = sum(count for _, _, count in groups)
    for name, value in (("image", launch.image), ("sagemaker.role_arn", settings.role_arn)):
        if not value:
            raise UserError(f"A training job needs launch.{name}: --{name.removeprefix('sagemaker.')} ….")
    if nodes > 1 and "RAY_AUTH_TOKEN" not in launch.secrets and not settings.open_ray:
        raise UserError(
            "Ray's nodes on several instances need a secret in common, else who reaches a port of theirs runs code. "
            'Make one: aws secretsmanager create-secret --name manta/ray --secret-string "$(openssl rand -hex 32)"; '
            'set --secrets \'{"RAY_AUTH_TOKEN": "manta/ray"}\'. Or, where the security group lets nobody else in: '
            "--open_ray."
        )
    config, checkpoints = _places(config, launch, nodes)
    hyperparameters = {name: encoded(value) for name, value in job.flags(config).items()}
    name = settings.job_name or f"{job.label(str(config.run_name), LONGEST_NAME - 16)}-{time.strftime('%Y%m%d-%H%M%S')}"
    output = settings.output_path or f"{checkpoints or config.results_dir}/sagemaker"
    stopping = {"MaxRuntimeInSeconds": round(settings.max_run_hours * 3600)}
    if settings.spot:
        waiting = settings.max_wait_hours or 2 * settings.max_run_hours
        stopping["MaxWaitTimeInSeconds"] = round(waiting * 3600)
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {
            "TrainingImage": launch.image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ENTRY,
            "ContainerArguments": [
                "--join_timeout",
                str(settings.join_timeout_s),
                *([] if launch.export else ["--no_export"]),
            ],
        },
        "RoleArn": settings.role_arn,
        "HyperParameters": hyperparameters,
        "InputDataConfig": [_channel(each, where) for each, where in settings.channels.items()],
        # Plain files: an endpoint starts from them without unpacking.
        "OutputDataConfig": {"S3OutputPath": output, "CompressionType": "NONE"},
        "ResourceConfig": _resources(launch, groups),
        "StoppingCondition": stopping,
        "Environment": _environment(launch),
        "EnableManagedSpotTraining": settings.spot,
        "EnableInterContainerTrafficEncryption": settings.encrypt_traffic,
        "Tags": [
            {"Key": key, "Value": value} for key, value in {"manta-run": config.run_name, **settings.tags}.items()
        ],
    }
    if checkpoints:
        request["CheckpointConfig"] = {"S3Uri": checkpoints, "LocalPath": CHECKPOINTS}
    if settings.subnets:
        request["VpcConfig"] = {"Subnets": list(settings.subnets), "SecurityGroupIds": list(settings.security_groups)}
    if not request["InputDataConfig"]:
        del request["InputDataConfig"]
    for what in ("HyperParameters", "Environment"):
        if len(request[what]) > _MOST:
            raise UserError(
                f"SageMaker takes {_MOST} {what}, and these are {len(request[what])}. Leave out some settings."
            )
    return request


def encoded(value: str) -> str:
    """A hyperparameter, as SageMaker's own estimators write it: JSON. `decoded` of the entry point is the inverse."""
    try:
        return json.dumps(value, ensure_ascii=False) if isinstance(json.loads(value), str) else value
    except ValueError:
        return json.dumps(value, ensure_ascii=False)


def _places(config: Config, launch: LaunchConfig, nodes: int) -> tuple[Config, str | None]:
    """The config as the containers need it, and where SageMaker itself copies checkpoints, if it does."""
    settings = launch.sagemaker
    groups = settings.groups(nodes)
    unknown = sorted({kind for _, kind, _ in groups} - set(INSTANCES))
    if config.num_workers is None and unknown:
        raise UserError(f"How many GPUs {', '.join(unknown)} has is not known here. Set --num_workers and --device.")
    gpus = sum(INSTANCES[kind].gpus * count for _, kind, count in groups if kind in INSTANCES)
    data = config.hf_dataset_config
    if "train" in settings.channels:
        data = data.model_copy(update={"dataset_name": f"{CHANNELS}/train"})
    config = config.model_copy(
        update={
            "num_workers": config.num_workers or gpus,
            "hf_dataset_config": data,
            "hf_model_id": f"{CHANNELS}/model" if "model" in settings.channels else config.hf_model_id,
            "results_dir": CHECKPOINTS if settings.sync_checkpoints else config.results_dir,
        }
    )
    if settings.sync_checkpoints and nodes > 1:
        raise UserError("sync_checkpoints is for one instance: several need --results_dir s3://…, where all write.")
    job.check_places(config, [CHANNELS, CHECKPOINTS] if settings.sync_checkpoints else [CHANNELS])
    return job.placed(config, launch, gpus), settings.sync_checkpoints


def _channel(name: str, where: str) -> dict[str, Any]:
    """Whole on each instance: tasks on any of them read it."""
    if not where.startswith("s3://"):
        raise UserError(f"channels.{name} is {where}; give s3://bucket/folder.")
    source = {"S3DataType": "S3Prefix", "S3Uri": where, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "InputMode": "File", "DataSource": {"S3DataSource": source}}


def _resources(launch: LaunchConfig, groups: list[tuple[str, str, int]]) -> dict[str, Any]:
    settings = launch.sagemaker
    found: dict[str, Any] = {"VolumeSizeInGB": settings.volume_gb} if settings.volume_gb else {}
    if settings.instance_groups:
        found["InstanceGroups"] = [
            {"InstanceGroupName": name, "InstanceType": kind, "InstanceCount": count} for name, kind, count in groups
        ]
    else:
        found |= {"InstanceType": groups[0][1], "InstanceCount": groups[0][2]}
    if settings.keep_alive_minutes:
        found["KeepAlivePeriodInSeconds"] = settings.keep_alive_minutes * 60
    return found


def _environment(launch: LaunchConfig) -> dict[str, str]:
    kinds = [kind for _, kind, _ in launch.sagemaker.groups(launch.node_range[1])]
    efa = all(kind in INSTANCES and INSTANCES[kind].efa for kind in kinds)
    return {
        # The network interface is in each host's own config, which the entry point reads.
        **({"FI_PROVIDER": "efa"} if efa else {}),
        **job.environment(launch),
        **{f"{SECRET}{name}": where for name, where in launch.secrets.items()},
        **({OPEN: "1"} if launch.sagemaker.open_ray else {}),
    }
