"""Where a run goes: the section `launch` of a recipe, or flags of `manta launch`. The run itself is `manta.config`'s.

A secret is never a value here, only a reference: `secrets: {HF_TOKEN: hub#token}` is the key `token` of what is called
`hub` where the run goes (a Secret of Kubernetes, one of AWS Secrets Manager; on Slurm, a file).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from manta.dataset_config import explain, parse_json, without_password
from manta.errors import ConfigError
from manta.launch.instances import INSTANCES
from manta.recipe import read_yaml
from manta.references import SECRET_NAME

_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|[KMGTP]i?)?$"


class Section(BaseModel):
    """Strict, frozen; a flag's text is JSON for a field that holds more than a word."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        more = {
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.get_default(call_default_factory=True), dict | tuple)
        }
        return {key: parse_json(value) if key in more else value for key, value in values.items()}


class RayConfig(Section):
    """A Ray cluster that is there already."""

    address: str | None = Field(None, description="Its dashboard, such as http://10.0.0.1:8265; default: RAY_ADDRESS")
    working_dir: str | None = Field(None, description="Folder that is sent along, such as one with data; default: none")
    driver_cpus: float = Field(0, ge=0, description="CPUs that the driver reserves")

    _check_address = field_validator("address")(lambda cls, value: value and without_password(value))


class SageMakerConfig(Section):
    """A training job of SageMaker, and an endpoint for what it trained."""

    role_arn: str | None = Field(None, description="The job's IAM role, arn:aws:iam::…:role/…")
    instance_type: str = Field("ml.p4d.24xlarge", pattern=r"^ml\.", description="Type of each instance")
    instance_groups: dict[str, str] = Field(
        default_factory=dict, description='JSON: instead of nodes and instance_type, {"name": "2 × ml.p4d.24xlarge"}'
    )
    job_name: str | None = Field(
        None, pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$", description="Default: the run's name and the time"
    )
    output_path: str | None = Field(None, pattern=r"^s3://", description="Where the model goes; default: results_dir")
    channels: dict[str, str] = Field(
        default_factory=dict, description='JSON: {"train": "s3://…", "model": "s3://…"}: the data, the base model'
    )
    max_run_hours: float = Field(24, gt=0, le=672, description="The job ends after this")
    spot: bool = Field(False, description="On spare capacity: cheaper, and interrupted at times")
    max_wait_hours: float | None = Field(None, gt=0, le=672, description="With spot: waiting and running; default: 2 ×")
    keep_alive_minutes: int = Field(0, ge=0, le=60, description="Warm pool: keep instances for the next job")
    volume_gb: int | None = Field(
        None, ge=1, description="Disk of each instance; default: its own NVMe, as GPU types have"
    )
    sync_checkpoints: str | None = Field(
        None, pattern=r"^s3://", description="One instance: SageMaker copies /opt/ml/checkpoints there; default: direct"
    )
    subnets: tuple[str, ...] = Field((), description='JSON: of a VPC, ["subnet-…"]')
    security_groups: tuple[str, ...] = Field((), description='JSON: of a VPC, ["sg-…"]')
    encrypt_traffic: bool = Field(False, description="Encrypt traffic between instances; slower")
    open_ray: bool = Field(
        False, description="Several instances without a token for Ray: whoever reaches them has them"
    )
    tags: dict[str, str] = Field(default_factory=dict, description='JSON: {"team": "nlp"}')
    region: str | None = Field(None, description="Default: the environment's")
    join_timeout_s: int = Field(900, ge=1, description="An instance that has not come by then ends the job")
    endpoint_name: str | None = Field(
        None, pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$", description="With --endpoint; default: the run's name"
    )
    endpoint_instance_type: str = Field("ml.g5.2xlarge", pattern=r"^ml\.", description="With --endpoint: its instance")
    endpoint_image: str | None = Field(
        None, description="With --endpoint: LMI container; default: vLLM's of the region"
    )
    model_data: str | None = Field(
        None,
        pattern=r"^s3://",
        description="With --endpoint: the model's folder; default: what job_name left, or the run's export",
    )
    max_model_len: int = Field(8192, ge=2, description="With --endpoint: longest prompt and answer, in tokens")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("a VPC needs both subnets and security_groups")
        if self.spot and self.keep_alive_minutes:
            raise ValueError("spot instances have no warm pool: leave out keep_alive_minutes")
        if self.max_wait_hours is not None and (not self.spot or self.max_wait_hours < self.max_run_hours):
            raise ValueError("max_wait_hours goes with spot, and is at least max_run_hours")
        for name, group in self.instance_groups.items():
            if not re.fullmatch(r"\d+ ?[×x] ?ml\.[\w.-]+", group):
                raise ValueError(f"instance_groups.{name} is '{group}'; write '2 × ml.p4d.24xlarge'")
        return self

    def groups(self, nodes: int) -> list[tuple[str, str, int]]:
        """Name, instance type and number of instances of each group."""
        if not self.instance_groups:
            return [("all", self.instance_type, nodes)]
        found = [(name, *re.split(r" ?[×x] ?", group, maxsplit=1)) for name, group in self.instance_groups.items()]
        return [(name, kind, int(count)) for name, count, kind in found]


class KubernetesConfig(Section):
    """A RayJob of KubeRay."""

    namespace: str | None = Field(None, description="Default: that of kubectl's context")
    job_name: str | None = Field(None, description="At most 47 characters; default: the run's name")
    gpus: int = Field(8, ge=0, description="GPUs of a worker pod, each with a training worker; 0: CPU workers")
    cpus: float = Field(32, gt=0, description="CPUs of a worker pod")
    memory: str = Field("256Gi", pattern=_QUANTITY, description="Memory of a worker pod")
    gpu_resource: str = Field("nvidia.com/gpu", description="What the device plugin calls a GPU")
    head_cpus: float = Field(4, gt=0, description="CPUs of the head, which runs the driver and merges the model")
    head_memory: str = Field("64Gi", pattern=_QUANTITY, description="Memory of the head")
    shm: str = Field("32Gi", pattern=_QUANTITY, description="/dev/shm of each pod: Ray's objects, NCCL, loaders")
    cache: str = Field("200Gi", pattern=_QUANTITY, description="Each pod's disk for models and copies")
    claim: str | None = Field(None, description="PersistentVolumeClaim that all pods mount (ReadWriteMany)")
    mount_path: str = Field("/data", pattern=r"^/", description="Where the claim is mounted")
    service_account: str | None = Field(None, description="Its role opens the store, such as S3 by IRSA")
    queue: str | None = Field(None, description="Kueue's LocalQueue")
    priority_class: str | None = Field(None, description="Kueue's WorkloadPriorityClass")
    node_selector: dict[str, str] = Field(default_factory=dict, description="JSON: labels of nodes for the workers")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="JSON: of the workers, beside that of GPUs")
    resources: dict[str, str] = Field(default_factory=dict, description='JSON: more, {"vpc.amazonaws.com/efa": "4"}')
    image_pull_secret: str | None = Field(None, description="Secret for a private registry")
    retries: int = Field(3, ge=0, description="New clusters after a failed one; each goes on from the last checkpoint")
    max_run_hours: float | None = Field(None, gt=0, description="The job ends after this; default: never")
    keep_hours: float = Field(24, ge=0, description="A finished job is deleted after this; its cluster at once")
    ray_token: bool = Field(True, description="Ray's nodes ask for a token, which the operator makes (KubeRay 1.5.1)")


class HyperPodConfig(Section):
    """A HyperPod cluster of SageMaker, which is EKS (with the section kubernetes, too) or Slurm."""

    orchestrator: Literal["eks", "slurm"] = Field("eks", description="What the cluster is made of")
    instance_type: str = Field("ml.p4d.24xlarge", pattern=r"^ml\.", description="Type of the instances to use")
    fsx_claim: str | None = Field(None, description="EKS: the claim of FSx for Lustre, mounted at mount_path")
    team: str | None = Field(None, description="EKS: team of task governance, which names its namespace and queue")
    partition: str | None = Field(None, description="Slurm: partition")
    max_run_hours: float | None = Field(None, gt=0, description="Slurm: time limit; default: the partition's")
    python: str = Field("python3", description="Slurm: the interpreter that has Manta, on a disk that all nodes see")
    job_name: str | None = Field(None, pattern=r"^[\w.-]+$", description="Slurm: default: the run's name")
    join_timeout_s: int = Field(600, ge=1, description="Slurm: a node that has not come by then ends the job")

    @field_validator("instance_type")
    @classmethod
    def _check_instance(cls, name: str) -> str:
        if name not in INSTANCES:
            nearest = difflib.get_close_matches(name, INSTANCES, n=3)
            raise ValueError(f"is {name}, whose GPUs are not known here; known are {', '.join(nearest or INSTANCES)}")
        return name


class LaunchConfig(Section):
    """What targets share, and a section for each."""

    image: str | None = Field(None, pattern=r"^\S+$", description="Container image that has Manta")
    nodes: int | str = Field(1, description="Hosts with training workers, or a range such as 1:4 where it can change")
    env: dict[str, str] = Field(default_factory=dict, description='JSON: variables, {"NCCL_DEBUG": "WARN"}; no secrets')
    secrets: dict[str, str] = Field(
        default_factory=dict, description='JSON: variable → where its value is, {"HF_TOKEN": "name#key"}'
    )
    network_interface: str | None = Field(None, pattern=r"^[\w^=,.-]+$", description="NCCL's and gloo's, such as eth0")
    offline: bool = Field(False, description="Ask the hub for nothing: models and data are on the hosts or the store")
    export: bool = Field(True, description="When training has finished, write the merged model, ready to be served")
    ray: RayConfig = Field(default_factory=RayConfig, description="A Ray cluster that is there already")
    sagemaker: SageMakerConfig = Field(default_factory=SageMakerConfig, description="SageMaker training and endpoints")
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig, description="KubeRay")
    hyperpod: HyperPodConfig = Field(default_factory=HyperPodConfig, description="SageMaker HyperPod")

    @field_validator("nodes", mode="before")
    @classmethod
    def _check_nodes(cls, value: Any) -> int | str:
        found = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
        fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if isinstance(value, bool) or not 1 <= fewest <= most:
            raise ValueError("must be a whole number from 1, or a range of two such as 1:4")
        return fewest if fewest == most else f"{fewest}:{most}"

    @field_validator("env")
    @classmethod
    def _check_env(cls, env: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in env if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ValueError(f"names {wrong}, which no variable can have")
        if secret := [name for name in env if SECRET_NAME.search(name)]:
            raise ValueError(f"{', '.join(secret)} would be written down; give where it is instead, in `secrets`")
        return env

    @field_validator("secrets")
    @classmethod
    def _check_secrets(cls, secrets: dict[str, str]) -> dict[str, str]:
        for name, where in secrets.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.fullmatch(r"[\w.:/@+=~-]+(#[\w.-]+)?", where):
                raise ValueError(f"{name}: give where the value is, as name or name#key")
            if re.match(r"hf_[A-Za-z0-9]{20,}|sk-|AKIA|ghp_|wandb_v1", where):
                raise ValueError(f"{name} looks like the secret itself; give where it is, as name or name#key")
        return secrets

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most hosts with training workers."""
        fewest, _, most = str(self.nodes).partition(":")
        return int(fewest), int(most or fewest)

    @classmethod
    def of(cls, recipe: str | Path | None, target: str, flags: Mapping[str, Any]) -> Self:
        """The recipe's section `launch`, and flags over it: shared ones, and those of the target's own section.

        Raises ConfigError, one line per wrong setting.
        """
        values = (read_yaml(recipe).get("launch") if recipe else None) or {}
        if not isinstance(values, Mapping):
            raise ConfigError(f"launch must be a mapping of settings, not {values!r}.")
        own = {name: value for name, value in flags.items() if name in sections(target)}
        values = {**values, **{name: value for name, value in flags.items() if name not in own}}
        for name, section in sections(target).items():
            if name in own:
                before = values.get(section) or {}
                values[section] = {**(before if isinstance(before, Mapping) else {}), name: own[name]}
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ConfigError, one line per wrong setting."""
        places: list[tuple[str, type[Section], Any]] = [("launch", cls, values)]
        places += [(f"launch.{name}", section, values.get(name)) for name, section in SECTIONS.items()]
        for where, model, given in places:
            for key in given if isinstance(given, Mapping) else ():
                if key not in model.model_fields:
                    nearest = difflib.get_close_matches(str(key), model.model_fields, n=1)
                    hint = f"Did you mean {nearest[0]}?" if nearest else f"Known are {', '.join(model.model_fields)}."
                    raise ConfigError(f"Unknown setting {where}.{key}. {hint}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [explain({**problem, "loc": ("launch", *problem["loc"])}, False) for problem in error.errors()]
            raise ConfigError("\n".join(lines)) from error


SECTIONS: dict[str, type[Section]] = {
    "ray": RayConfig,
    "sagemaker": SageMakerConfig,
    "kubernetes": KubernetesConfig,
    "hyperpod": HyperPodConfig,
}
SHARED = [name for name in LaunchConfig.model_fields if name not in SECTIONS]


def sections(target: str) -> dict[str, str]:
    """Flag → the section it belongs to. HyperPod on EKS is Kubernetes, too; its own settings come first."""
    names = ("kubernetes", "hyperpod") if target == "hyperpod" else (target,)
    return {field: name for name in names for field in SECTIONS[name].model_fields}
