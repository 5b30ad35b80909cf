"""How the hosts of a job find each other, and what the entry point makes of SageMaker's files. Runs over real hosts are
in integration/test_sagemaker_hosts.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from manta import nodes
from manta.errors import ConfigError, UserError
from manta.launch import rendezvous, sagemaker_entry, supervise
from manta.launch.supervise import Stop


def test_all_hosts_agree_on_the_first():
    names = [f"algo-{number}" for number in range(1, 13)]
    assert rendezvous.ordered(reversed(names)) == tuple(names)
    assert rendezvous.ordered(["b", "aa", "a", "b"]) == ("a", "b", "aa")


def test_a_name_that_leads_home_or_nowhere_is_no_address():
    with pytest.raises(UserError, match=r"localhost has no address but 127\.0\.0\.1, which other hosts cannot reach"):
        rendezvous.address_of("localhost", 0)
    with pytest.raises(UserError, match=r"no-such-host\.invalid has no address, after 0 s"):
        rendezvous.address_of("no-such-host.invalid", 0)


def test_a_name_is_waited_for(monkeypatch):
    """Other hosts' names are known some time after containers start."""
    asked = []

    def resolve(name: str, *about: Any) -> list[Any]:
        asked.append(name)
        if len(asked) < 3:
            raise OSError("unknown") if len(asked) == 1 else socket.gaierror("not yet")
        return [(2, 1, 6, "", (address, 0)) for address in ("127.0.1.1", "10.0.0.7")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(rendezvous, "_PAUSE_S", 0.01)
    assert rendezvous.address_of("algo-2", 30) == "10.0.0.7" and len(asked) == 3


def test_the_token_is_the_jobs_own_and_made_of_a_secret_only():
    def token(job: str, hosts: int = 2, **environ: str) -> tuple[str | None, str]:
        rendezvous.set_ray_token(environ, job, hosts, bool(environ.pop("OPEN", "")))
        return environ.get("RAY_AUTH_TOKEN"), environ["RAY_AUTH_MODE"]

    one, mode = token("job-1", RAY_AUTH_TOKEN="a secret")
    assert mode == "token" and one and len(one) == 64 and one != "a secret"
    assert token("job-1", RAY_AUTH_TOKEN="a secret")[0] == one  # on every host
    assert token("job-2", RAY_AUTH_TOKEN="a secret")[0] != one
    assert token("job-1", RAY_AUTH_TOKEN="another")[0] != one
    with pytest.raises(UserError, match="a secret in common"):
        token("job-1")
    assert token("job-1", OPEN="1") == (None, "disabled")
    alone = {token("job-1", 1)[0] for _ in range(2)}
    assert len(alone) == 2 and None not in alone


def test_the_interface_is_sagemakers_unless_the_user_has_said():
    environ = {"GLOO_SOCKET_IFNAME": "mine"}
    rendezvous.set_interface(environ, "eth0")
    assert environ == {"GLOO_SOCKET_IFNAME": "mine", "NCCL_SOCKET_IFNAME": "eth0"}
    rendezvous.set_interface(environ, None)
    assert environ["NCCL_SOCKET_IFNAME"] == "eth0"


def test_the_failure_is_written_once_and_is_short(tmp_path):
    file = tmp_path / "output" / "failure"
    supervise.write_failure(file, "the first reason " + "x" * 5000)
    supervise.write_failure(file, "what followed from it")
    text = file.read_text()
    assert text.startswith("the first reason") and len(text) == 1024


def test_a_file_asks_to_stop_as_a_signal_does(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setenv("MANTA_STOP_FILE", str(tmp_path / "stop"))
        stop = Stop()
        assert not stop.wanted()
        (tmp_path / "stop").touch()
        assert stop.wanted() and not stop.over()
        stop = Stop()
        monkeypatch.delenv("MANTA_STOP_FILE")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted()
        stop.since = time.monotonic() - supervise.SAVE_S - 1
        assert stop.over()
    finally:
        signal.signal(signal.SIGTERM, before)


def root_with(folder: Path, hyperparameters: dict[str, str], channels: tuple[str, ...] = ()) -> Path:
    about = folder / "input" / "config"
    about.mkdir(parents=True)
    (about / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    (about / "inputdataconfig.json").write_text(json.dumps({name: {} for name in channels}))
    return folder


def test_hyperparameters_and_channels_make_the_config(tmp_path):
    given = {
        "hf_model_id": '"Qwen/Qwen3-8B"',
        "max_steps": "10000",
        "learning_rate": '"0.001"',
        "hfdc_input_template": '"Q: {question}\\\\n"',
        "sagemaker_program": '"ray_train_sft.py"',
        "results_dir": "s3://bucket/runs",
    }
    root = root_with(tmp_path / "a", given, ("training",))
    config = sagemaker_entry.settings(root, 2)
    assert (config.hf_model_id, config.max_steps, config.learning_rate) == ("Qwen/Qwen3-8B", 10000, 0.001)
    assert config.hf_dataset_config.dataset_name == str(root / "input/data/training")
    assert config.hf_dataset_config.input_template == "Q: {question}\n"
    assert config.results_dir == "s3://bucket/runs" and config.run_name
    with_model = sagemaker_entry.settings(root_with(tmp_path / "b", given, ("train", "model")), 2)
    assert with_model.hf_model_id == str(tmp_path / "b/input/data/model")
    alone = root_with(tmp_path / "c", {})
    assert sagemaker_entry.settings(alone, 1).results_dir == str(alone / "checkpoints")


@pytest.mark.parametrize(
    ("given", "hosts", "says"),
    [
        ({"max_stepz": "1"}, 1, "Did you mean max_steps"),
        ({"max_steps": "many"}, 1, "max_steps"),
        ({}, 2, "is a disk of one of 2 hosts"),
    ],
)
def test_what_is_wrong_with_a_job_is_its_failure(given, hosts, says, tmp_path, capsys):
    root = root_with(tmp_path, given)
    with pytest.raises((UserError, ConfigError), match=says):
        sagemaker_entry.settings(root, hosts)
    names = [f"algo-{number}" for number in range(1, hosts + 1)]
    (root / "input/config/resourceconfig.json").write_text(json.dumps({"hosts": names, "current_host": "algo-1"}))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert sagemaker_entry.main(["train", "--root", str(root)]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert says in (root / "output/failure").read_text() and says in capsys.readouterr().err


def test_secrets_are_fetched_by_name_and_never_told(monkeypatch):
    import boto3
    from moto import mock_aws

    value = "hf_thisIsTheValue"
    with mock_aws():
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        manager = boto3.client("secretsmanager", region_name="us-east-1")
        manager.create_secret(Name="hub", SecretString=json.dumps({"token": value}))
        manager.create_secret(Name="plain", SecretString="as it is")
        environ = {"MANTA_SECRET_HF_TOKEN": "hub#token", "MANTA_SECRET_OTHER": "plain", "AWS_REGION": "us-east-1"}
        assert sorted(sagemaker_entry.resolve_secrets(environ)) == ["HF_TOKEN", "OTHER"]
        assert environ["HF_TOKEN"] == value and environ["OTHER"] == "as it is"
        for where in ("hub#other", "plain#key", "missing"):
            with pytest.raises(UserError, match=r"HF_TOKEN: .* cannot be read") as refusal:
                sagemaker_entry.resolve_secrets({**environ, "MANTA_SECRET_HF_TOKEN": where})
            assert value not in str(refusal.value) and "as it is" not in str(refusal.value)


def test_storage_as_another_node_sees_it(tmp_path):
    (tmp_path / "mark").write_text("mark")
    assert nodes.try_storage(str(tmp_path), "mark")[1] is None
    assert "another disk" in str(nodes.try_storage(str(tmp_path), "not there")[1])
    (tmp_path / "mark").write_text("something else")
    assert "does not give back" in str(nodes.try_storage(str(tmp_path), "mark")[1])
    assert "cannot be written" in str(nodes.try_storage("nostore://bucket", "mark")[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark"]
