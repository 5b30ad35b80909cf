"""A run as a RayJob of KubeRay (ray.io/v1): a head that runs the driver, pods of workers, storage that all of them see.

An attempt that fails is repeated on a new cluster (`backoffLimit`). It has the same run name, so it goes on from the
last checkpoint, and the lease in the run's folder keeps it from training beside an attempt that still lives.
"""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from typing import Any

import yaml

from manta.config import Config
from manta.errors import UserError
from manta.head import SYSTEM
from manta.launch import job
from manta.launch.config import KubernetesConfig, LaunchConfig
from manta.launch.job_entry import EXPORT, RECIPE
from manta.launch.rendered import Files, to_yaml

FILE = "rayjob.yaml"
LONGEST_NAME = 47  # KubeRay names the cluster after it, and pods after that
GRACE_S = 120  # what a pod is given to save after SIGTERM
_CACHE = "/cache"


def render(config: Config, launch: LaunchConfig) -> Files:
    """The manifest. Raises UserError for what Kubernetes or the operator would refuse, or wait for without an end."""
    settings = launch.kubernetes
    if not launch.image:
        raise UserError(
            "Kubernetes needs a container image that has Manta: --image registry/manta:tag (see Dockerfile)."
        )
    fewest, most = launch.node_range
    if settings.queue and fewest != most:
        raise UserError(f"Kueue admits a fixed number of pods: set --nodes {fewest} or {most}, or leave out --queue.")
    config = job.placed(config, launch, settings.gpus)
    if settings.claim and config.results_dir == Config.model_fields["results_dir"].default:
        config = config.model_copy(update={"results_dir": f"{settings.mount_path}/runs"})
    if settings.claim and config.data_dir == Config.model_fields["data_dir"].default:
        config = config.model_copy(update={"data_dir": f"{settings.mount_path}/prepared"})
    job.check_places(config, [settings.mount_path] if settings.claim else [])
    manifest = _manifest(config, launch)
    check(manifest)
    return {FILE: to_yaml(manifest)}


def submit(files: Files) -> str:
    """`kubectl apply`; returns what it said. Raises UserError if it refuses."""
    try:
        done = subprocess.run(["kubectl", "apply", "-f", "-"], input=files[FILE], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("kubectl is not installed. Install it, or take the file of --output_dir elsewhere.") from error
    if done.returncode:
        raise UserError(f"kubectl apply refused {FILE}: {done.stderr.strip()}")
    name = yaml.safe_load(files[FILE])["metadata"]["name"]
    return f"{done.stdout.strip()}\nFollow it: kubectl get rayjob {name}; kubectl logs -f -l job-name={name}"


def _manifest(config: Config, launch: LaunchConfig) -> dict[str, Any]:
    settings = launch.kubernetes
    name = settings.job_name or job.label(str(config.run_name), LONGEST_NAME)
    labels = {"app.kubernetes.io/name": "manta"}
    if settings.queue:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    if settings.priority_class:
        labels["kueue.x-k8s.io/priority-class"] = settings.priority_class
    spec: dict[str, Any] = {
        "entrypoint": "python -m manta.launch.job_entry",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,  # GPUs are given back at once
        "backoffLimit": settings.retries,
        "rayClusterSpec": _cluster(config, launch),
    }
    if settings.max_run_hours:
        spec["activeDeadlineSeconds"] = round(settings.max_run_hours * 3600)
    metadata = {"name": name, **({"namespace": settings.namespace} if settings.namespace else {}), "labels": labels}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _cluster(config: Config, launch: LaunchConfig) -> dict[str, Any]:
    settings = launch.kubernetes
    fewest, most = launch.node_range
    more = {settings.gpu_resource: str(settings.gpus)} if settings.gpus else {}
    gpu_taint = {"key": settings.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
    cluster: dict[str, Any] = {"rayVersion": version("ray")}
    if settings.ray_token:
        cluster["authOptions"] = {"mode": "token"}
    if fewest != most:
        cluster |= {"enableInTreeAutoscaling": True, "autoscalerOptions": {"idleTimeoutSeconds": 300}}
    workers = _pod(launch, "ray-worker", settings.cpus, settings.memory, more | settings.resources)
    workers["spec"] |= {"nodeSelector": settings.node_selector} if settings.node_selector else {}
    tolerations = [*settings.tolerations, *([gpu_taint] if settings.gpus else [])]
    workers["spec"] |= {"tolerations": tolerations} if tolerations else {}
    head = _pod(launch, "ray-head", settings.head_cpus, settings.head_memory, {})
    driver = {RECIPE: job.recipe(config)} | ({EXPORT: "1"} if launch.export else {})
    head["spec"]["containers"][0]["env"] += [{"name": name, "value": value} for name, value in driver.items()]
    return cluster | {
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},  # no training worker beside the driver
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": fewest,
                "minReplicas": fewest,
                "maxReplicas": most,
                "rayStartParams": {},
                "template": workers,
            }
        ],
    }


def _pod(launch: LaunchConfig, name: str, cpus: float, memory: str, more: dict[str, str]) -> dict[str, Any]:
    settings = launch.kubernetes
    resources = {"cpu": f"{cpus:g}", "memory": memory, **more}
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
        {"name": "cache", "emptyDir": {"sizeLimit": settings.cache}},
    ]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "cache", "mountPath": _CACHE}]
    if settings.claim:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": settings.claim}})
        mounts.append({"name": "data", "mountPath": settings.mount_path})
    container = {
        "name": name,
        "image": launch.image,
        "env": _environment(launch, settings),
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    spec: dict[str, Any] = {"terminationGracePeriodSeconds": GRACE_S, "containers": [container], "volumes": volumes}
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": settings.image_pull_secret}]
    return {"spec": spec}


def _environment(launch: LaunchConfig, settings: KubernetesConfig) -> list[dict[str, Any]]:
    models = f"{settings.mount_path if settings.claim else _CACHE}/huggingface"  # each model is fetched once
    system = {f"RAY_{name}": str(value) for name, value in SYSTEM.items()}
    values = system | {"MANTA_CACHE": f"{_CACHE}/manta", "HF_HOME": models} | job.environment(launch)
    secrets = []
    for name, where in launch.secrets.items():
        if name == "RAY_AUTH_TOKEN" and settings.ray_token:  # the operator's own
            continue
        secret, _, key = where.partition("#")
        secrets.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key or name}}})
    return [*({"name": name, "value": value} for name, value in values.items()), *secrets]


def check(manifest: dict[str, Any]) -> None:
    """The operator's own rules, beyond its schema; it writes a breach into the job's status, where nobody looks.

    https://github.com/ray-project/kuberay/blob/master/ray-operator/controllers/ray/utils/validation.go
    Raises UserError with one line per breach.
    """
    spec, found = manifest["spec"], []
    cluster, name = spec["rayClusterSpec"], manifest["metadata"]["name"]
    if len(name) > LONGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(
            f"job_name {name}: at most {LONGEST_NAME} lower-case letters, digits and hyphens, a letter first "
            f"({len(name)} now)"
        )
    if spec.get("backoffLimit", 0) < 0 or spec.get("activeDeadlineSeconds", 1) <= 0:
        found.append("retries and max_run_hours may not be negative")
    if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished goes with shutdownAfterJobFinishes")
    if cluster.get("authOptions", {}).get("mode") == "token" and _before(cluster.get("rayVersion", ""), (2, 52)):
        found.append("a token needs Ray 2.52 or newer: leave it out with --ray_token false")
    groups = cluster["workerGroupSpecs"]
    if len({group["groupName"] for group in groups}) < len(groups):
        found.append("two worker groups have one name")
    for group in (cluster["headGroupSpec"], *groups):
        where = group.get("groupName", "head")
        if not all(isinstance(value, str) for value in group["rayStartParams"].values()):
            found.append(f"rayStartParams of {where} must be strings")
        if not group["template"]["spec"]["containers"]:
            found.append(f"{where} has no container")
        if not group.get("minReplicas", 1) <= group.get("replicas", 1) <= group.get("maxReplicas", 1):
            found.append(f"replicas of {where} are not between minReplicas and maxReplicas")
        for container in group["template"]["spec"]["containers"]:
            names = [variable["name"] for variable in container["env"]]
            if twice := sorted({each for each in names if names.count(each) > 1}):
                found.append(f"{where} has {', '.join(twice)} twice")
    if found:
        raise UserError("Kubernetes would refuse this:\n" + "\n".join(f"  {line}" for line in found))


def _before(given: str, least: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", given)
    return numbers is None or (int(numbers[1]), int(numbers[2])) < least
