"""What each node of a Slurm step runs: python -m manta.launch.slurm_entry -- train --config recipe.yaml

The nodes come from Slurm itself at each start of the step, not from variables of the job: `srun --auto-resume=1`
starts the step again with a replaced node, which those variables do not know.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

from manta.errors import UserError
from manta.launch import rendezvous, supervise
from manta.launch.rendezvous import Hosts
from manta.launch.supervise import Outcome, Stop, say


def main(arguments: list[str] | None = None) -> int:
    """Exit code: that of the driver; 2 with a message; a node that followed ends with 0."""
    parser = argparse.ArgumentParser(description="One node of a Slurm step.")
    parser.add_argument("--join_timeout", type=float, default=600, help="Seconds to wait for a node")
    parser.add_argument("--network_interface", help="NCCL's and gloo's")
    parser.add_argument("command", nargs="+", help="A verb of manta with its flags, after --")
    given = parser.parse_args(arguments)
    stop = Stop()
    try:
        hosts = Hosts(nodes(), os.environ["SLURMD_NODENAME"], given.join_timeout, given.network_interface)
        outcome = run(hosts, given.command, stop)
    except UserError as error:
        say(str(error))
        return 2
    if outcome.failure and not outcome.failure.startswith("manta: "):  # the driver's own message has been shown
        say(outcome.failure)
    return outcome.code


def run(hosts: Hosts, command: list[str], stop: Stop) -> Outcome:
    """One node's part. The job's script has made a token for all of them. Raises UserError."""
    if len(hosts.names) > 1 and not os.environ.get("RAY_AUTH_TOKEN"):
        raise UserError("RAY_AUTH_TOKEN is not set: submit the script that `manta launch hyperpod` renders.")
    rendezvous.set_interface(os.environ, hosts.interface)
    if not hosts.lead:
        return supervise.follow(hosts, stop)

    def driver(address: str) -> list[str]:
        return [sys.executable, "-m", "manta", *command, "--ray_address", address]

    return supervise.lead(hosts, driver, stop, False, rendezvous.secret_values(os.environ, []))


def nodes() -> tuple[str, ...]:
    """The job's nodes as Slurm has them now. Raises UserError."""
    about = _scontrol("show", "job", os.environ.get("SLURM_JOB_ID", ""))
    found = re.search(r"(?<![A-Za-z])NodeList=(\S+)", about)  # beside ReqNodeList and ExcNodeList
    if not found or found[1] == "(null)":
        raise UserError("`scontrol show job` names no nodes: run this in a step of a job, by srun.")
    return rendezvous.ordered(_scontrol("show", "hostnames", found[1]).split())


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise UserError("scontrol is not here: this runs on a node of Slurm.") from error
    if done.returncode:
        raise UserError(f"scontrol {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
