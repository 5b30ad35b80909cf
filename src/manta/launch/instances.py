"""What an instance type of AWS has: https://aws.amazon.com/ec2/instance-types/ (EFA: the number of interfaces)."""

from __future__ import annotations

from typing import NamedTuple


class Instance(NamedTuple):
    """GPUs, virtual CPUs, memory in GiB, interfaces of EFA."""

    gpus: int
    cpus: int
    memory: int
    efa: int


INSTANCES = {
    "ml.g5.xlarge": Instance(1, 4, 16, 0),
    "ml.g5.2xlarge": Instance(1, 8, 32, 0),
    "ml.g5.4xlarge": Instance(1, 16, 64, 0),
    "ml.g5.8xlarge": Instance(1, 32, 128, 1),
    "ml.g5.12xlarge": Instance(4, 48, 192, 1),
    "ml.g5.16xlarge": Instance(1, 64, 256, 1),
    "ml.g5.24xlarge": Instance(4, 96, 384, 1),
    "ml.g5.48xlarge": Instance(8, 192, 768, 1),
    "ml.g6.xlarge": Instance(1, 4, 16, 0),
    "ml.g6.2xlarge": Instance(1, 8, 32, 0),
    "ml.g6.12xlarge": Instance(4, 48, 192, 1),
    "ml.g6.24xlarge": Instance(4, 96, 384, 1),
    "ml.g6.48xlarge": Instance(8, 192, 768, 1),
    "ml.g6e.xlarge": Instance(1, 4, 32, 0),
    "ml.g6e.2xlarge": Instance(1, 8, 64, 0),
    "ml.g6e.12xlarge": Instance(4, 48, 384, 1),
    "ml.g6e.24xlarge": Instance(4, 96, 768, 2),
    "ml.g6e.48xlarge": Instance(8, 192, 1536, 4),
    "ml.p4d.24xlarge": Instance(8, 96, 1152, 4),
    "ml.p4de.24xlarge": Instance(8, 96, 1152, 4),
    "ml.p5.48xlarge": Instance(8, 192, 2048, 32),
    "ml.p5e.48xlarge": Instance(8, 192, 2048, 32),
    "ml.p5en.48xlarge": Instance(8, 192, 2048, 16),
    "ml.p6-b200.48xlarge": Instance(8, 192, 2048, 8),
}
