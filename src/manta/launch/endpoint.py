"""An endpoint of SageMaker for what a run trained: model, configuration, endpoint; served by vLLM in LMI's container.

https://docs.djl.ai/master/docs/serving/serving/docs/lmi/user_guides/vllm_user_guide.html
"""

from __future__ import annotations

import json
from typing import Any

from manta import storage
from manta.config import Config
from manta.errors import UserError
from manta.launch import job
from manta.launch.config import LaunchConfig
from manta.launch.instances import INSTANCES
from manta.launch.rendered import Files
from manta.launch.sagemaker_api import call, check

FILE = "endpoint.json"
# LMI 15 with vLLM; the account is that of AWS's deep learning containers in most regions.
IMAGE = "763104351884.dkr.ecr.{region}.amazonaws.com/djl-inference:0.33.0-lmi15.0.0-cu128"
_AMI = "al2-ami-sagemaker-inference-gpu-3-1"  # has the driver that CUDA 12.8 needs
_START_S = 1800
_CALLS = ("create_model", "create_endpoint_config", "create_endpoint")


def render(config: Config, launch: LaunchConfig) -> Files:
    """The three requests, in their order. Raises UserError for what SageMaker would refuse."""
    found = requests(config, launch)
    for operation, request in found.items():
        check(operation, request)
    return {FILE: json.dumps(found, indent=2, ensure_ascii=False) + "\n"}


def submit(files: Files, launch: LaunchConfig) -> str:
    found = json.loads(files[FILE])
    for operation in _CALLS:
        call(operation, found[operation], launch.sagemaker.region)
    name = found["create_endpoint"]["EndpointName"]
    return f"endpoint {name} is being made: aws sagemaker wait endpoint-in-service --endpoint-name {name}"


def requests(config: Config, launch: LaunchConfig) -> dict[str, dict[str, Any]]:
    """`{operation: request}`, in the order in which they are to be made."""
    settings = launch.sagemaker
    if not settings.role_arn:
        raise UserError("An endpoint needs launch.sagemaker.role_arn: --role_arn ….")
    if not settings.endpoint_image and not settings.region:
        raise UserError("Which container serves the model follows from the region: --region …, or --endpoint_image ….")
    name = settings.endpoint_name or job.label(config.run_name or job.default_name(config), 63)
    container = {
        "Image": settings.endpoint_image or IMAGE.format(region=settings.region),
        "ModelDataSource": {
            "S3DataSource": {
                "S3Uri": f"{_model(config, launch).rstrip('/')}/",
                "S3DataType": "S3Prefix",
                "CompressionType": "None",
            }
        },
        "Environment": {
            "HF_MODEL_ID": "/opt/ml/model",
            "SERVING_FAIL_FAST": "true",
            "OPTION_ENTRYPOINT": "djl_python.lmi_vllm.vllm_async_service",
            "OPTION_ASYNC_MODE": "true",
            "OPTION_ROLLING_BATCH": "disable",
            "OPTION_TENSOR_PARALLEL_DEGREE": "max",
            "OPTION_MAX_MODEL_LEN": str(settings.max_model_len),
            **job.environment(launch),
        },
    }
    tags = [{"Key": key, "Value": value} for key, value in settings.tags.items()]
    model: dict[str, Any] = {
        "ModelName": name,
        "PrimaryContainer": container,
        "ExecutionRoleArn": settings.role_arn,
        "Tags": tags,
    }
    if settings.subnets:
        model["VpcConfig"] = {"Subnets": list(settings.subnets), "SecurityGroupIds": list(settings.security_groups)}
    variant: dict[str, Any] = {
        "VariantName": "all",
        "ModelName": name,
        "InitialInstanceCount": 1,
        "InstanceType": settings.endpoint_instance_type,
        "ModelDataDownloadTimeoutInSeconds": _START_S,
        "ContainerStartupHealthCheckTimeoutInSeconds": _START_S,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
    }
    if settings.endpoint_instance_type in INSTANCES:
        variant["InferenceAmiVersion"] = _AMI
    return {
        "create_model": model,
        "create_endpoint_config": {"EndpointConfigName": name, "ProductionVariants": [variant], "Tags": tags},
        "create_endpoint": {"EndpointName": name, "EndpointConfigName": name, "Tags": tags},
    }


def _model(config: Config, launch: LaunchConfig) -> str:
    """Where the merged model is: as told, what the training job `job_name` left, or the run's export on the store."""
    settings = launch.sagemaker
    if settings.model_data:
        return settings.model_data
    places = (settings.output_path, settings.sync_checkpoints, config.results_dir)
    store = next((place for place in places if place and storage.is_remote(place)), None)
    if store is None:
        raise UserError("Where is the model? --model_data s3://…: the job's output, or an export that you copied.")
    if settings.job_name:
        return f"{settings.output_path or f'{store}/sagemaker'}/{settings.job_name}/output/model"
    return f"{store}/{config.run_name or job.default_name(config)}/export"
