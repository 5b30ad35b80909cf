"""A run on SageMaker HyperPod: on EKS the RayJob of `kuberay` with what its nodes have, on Slurm a script for sbatch.

`hyp` submits no Ray jobs: `kubectl apply` does, and on Slurm `sbatch`. Nodes that HyperPod found faulty get no pod
(node-health-status), and `srun --auto-resume=1` has it replace a faulty node and start the step again.
https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-hyperpod-resiliency-slurm-auto-resume.html
"""

from __future__ import annotations

import shlex
import subprocess

from manta.config import Config
from manta.errors import UserError
from manta.launch import job, kuberay
from manta.launch.config import LaunchConfig
from manta.launch.instances import INSTANCES
from manta.launch.rendered import Files

SCRIPT = "job.sbatch"
# What Kubernetes' own pods and the system need of a node.
_SHARE_OF_CPUS, _SHARE_OF_MEMORY = 0.9, 0.85
_SAVE_S = 120

_SBATCH = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@{save}
{more}
# Ray's nodes ask each other for it; it is on no disk, and in no command line.
RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
export RAY_AUTH_TOKEN
{exports}
# A signal to the step would end Ray before it has saved, so the driver's host is told by a file.
export MANTA_STOP_FILE="$PWD/.stop-$SLURM_JOB_ID"
trap 'touch "$MANTA_STOP_FILE"' TERM

srun --auto-resume=1 --kill-on-bad-exit=1 \\
  {command} &
step=$!
while wait "$step"; code=$?; [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done  # a signal ends `wait`, too
[ "$code" -le 128 ] || {{ wait "$step"; code=$?; }}
rm -f "$MANTA_STOP_FILE"
[ "$code" -eq 0 ] || exit "$code"
{after}"""


def render(config: Config, launch: LaunchConfig) -> Files:
    """Raises UserError for what the cluster would refuse."""
    return _slurm(config, launch) if launch.hyperpod.orchestrator == "slurm" else _eks(config, launch)


def submit(files: Files) -> str:
    """`kubectl apply` or `sbatch`; returns what it said. Raises UserError if it refuses."""
    if SCRIPT not in files:
        return kuberay.submit(files)
    try:
        done = subprocess.run(["sbatch"], input=files[SCRIPT], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not here. Submit on a login node, or take the file of --output_dir there."
        ) from error
    if done.returncode:
        raise UserError(f"sbatch refused {SCRIPT}: {done.stderr.strip()}")
    return done.stdout.strip()


def _eks(config: Config, launch: LaunchConfig) -> Files:
    hyperpod, settings = launch.hyperpod, launch.kubernetes
    instance = INSTANCES[hyperpod.instance_type]
    update = {
        "gpus": instance.gpus,
        "cpus": int(instance.cpus * _SHARE_OF_CPUS),
        "memory": f"{int(instance.memory * _SHARE_OF_MEMORY)}Gi",
        "node_selector": {
            "node.kubernetes.io/instance-type": hyperpod.instance_type,
            "sagemaker.amazonaws.com/node-health-status": "Schedulable",
            **settings.node_selector,
        },
        "resources": ({"vpc.amazonaws.com/efa": str(instance.efa)} if instance.efa else {}) | settings.resources,
        "claim": hyperpod.fsx_claim or settings.claim,
        "job_name": hyperpod.job_name or settings.job_name,
        "max_run_hours": hyperpod.max_run_hours or settings.max_run_hours,
    }
    if (
        hyperpod.team
    ):  # https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-hyperpod-eks-operate-console-ui-governance-cli.html
        namespace = f"hyperpod-ns-{hyperpod.team}"
        update |= {
            "namespace": settings.namespace or namespace,
            "queue": settings.queue or f"{namespace}-localqueue",
        }
    env = ({"FI_PROVIDER": "efa"} if instance.efa else {}) | launch.env
    return kuberay.render(
        config, launch.model_copy(update={"kubernetes": settings.model_copy(update=update), "env": env})
    )


def _slurm(config: Config, launch: LaunchConfig) -> Files:
    hyperpod = launch.hyperpod
    instance = INSTANCES[hyperpod.instance_type]
    fewest, most = launch.node_range
    if fewest != most:
        raise UserError(f"A job of Slurm has a fixed number of nodes: set --nodes {fewest} or {most}.")
    config = job.placed(config, launch, instance.gpus)
    more = []
    if hyperpod.partition:
        more.append(f"#SBATCH --partition={hyperpod.partition}")
    if hyperpod.max_run_hours:
        more.append(f"#SBATCH --time={round(hyperpod.max_run_hours * 60)}")
    environment = (
        {"RAY_AUTH_MODE": "token"} | ({"FI_PROVIDER": "efa"} if instance.efa else {}) | job.environment(launch)
    )
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    for name, file in launch.secrets.items():
        if name == "RAY_AUTH_TOKEN":  # the script's own
            continue
        if not file.startswith("/"):
            raise UserError(
                f"On Slurm, secrets.{name} is a file that all nodes see, such as /fsx/secrets/{name.lower()}."
            )
        exports += [f'{name}="$(< {shlex.quote(file)})"', f"export {name}"]
    entry = [hyperpod.python, "-m", "manta.launch.slurm_entry", "--join_timeout", str(hyperpod.join_timeout_s), "--"]
    command = [*entry, *job.train_command(config)[1:]]
    convert = [hyperpod.python, "-m", *job.convert_command(config)]
    return {
        SCRIPT: _SBATCH.format(
            name=hyperpod.job_name or config.run_name,
            nodes=fewest,
            save=_SAVE_S,
            more="".join(f"{line}\n" for line in more),
            exports="\n".join(exports),
            command=shlex.join(command),
            after=f"{shlex.join(convert)}\n" if launch.export else "",
        )
    }
