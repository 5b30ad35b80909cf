"""An S3 server for tests: moto's, in a process of its own, spoken to by the real client over real HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ports import free_ports


def variables(host: str, port: int) -> dict[str, str]:
    """What a client's environment needs to reach the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def s3_server(*buckets: str) -> Iterator[dict[str, str]]:
    """A server on this machine with these buckets, whose variables are set in this process's environment meanwhile."""
    import boto3
    import fsspec

    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = {name: os.environ.get(name) for name in variables("", 0)}
    os.environ.update(variables("127.0.0.1", port))
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # clients of an earlier server
    try:
        limit = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < limit, "the S3 server does not start"
            time.sleep(0.1)
        client = boto3.client("s3")
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield variables("127.0.0.1", port)
    finally:
        server.terminate()
        server.wait(10)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
