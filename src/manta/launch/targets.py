"""Where a run can go, by name: what is rendered for it, and how that is submitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from manta.config import Config
from manta.launch import endpoint, hyperpod, kuberay, ray_job, sagemaker
from manta.launch.config import LaunchConfig
from manta.launch.rendered import Files, refuse_secrets


class Target(NamedTuple):
    """`render` writes nothing and submits nothing."""

    about: str
    render: Callable[[Config, LaunchConfig], Files]
    submit: Callable[[Files, LaunchConfig], str]


TARGETS = {
    "ray": Target("A Ray cluster that is there already, by Ray's Jobs API.", ray_job.render, ray_job.submit),
    "sagemaker": Target(
        "A training job of SageMaker, or an endpoint for its model.", sagemaker.render, sagemaker.submit
    ),
    "kubernetes": Target("A RayJob of KubeRay.", kuberay.render, lambda files, _: kuberay.submit(files)),
    "hyperpod": Target(
        "SageMaker HyperPod, on EKS or Slurm.", hyperpod.render, lambda files, _: hyperpod.submit(files)
    ),
}
ENDPOINT = Target("An endpoint of SageMaker.", endpoint.render, endpoint.submit)


def rendered(target: Target, config: Config, launch: LaunchConfig) -> Files:
    """The target's files. Raises UserError if anything is wrong with them, or a secret is in one of them."""
    files = target.render(config, launch)
    refuse_secrets(files)
    return files
