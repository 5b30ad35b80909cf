# Manta for SageMaker, Kubernetes and HyperPod:
#   docker build -t manta:0.1.0 .
# For EFA (several p4d, p5, … instances), build on an image that has its libraries and CUDA's, such as AWS's own:
#   docker build --build-arg BASE=763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:TAG -t manta:0.1.0 .
ARG BASE=python:3.12-slim
FROM ${BASE}

# wget: KubeRay asks Ray for its health with it.
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/manta
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt '.[s3,sagemaker]'

ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /root

# SageMaker runs `train` where a job names no entry point. `exec`: the first process is the one that hears SIGTERM.
RUN printf '#!/bin/sh\nexec python -m manta.launch.sagemaker_entry "$@"\n' > /usr/local/bin/train \
    && chmod +x /usr/local/bin/train
ENTRYPOINT []
CMD ["manta", "--help"]
