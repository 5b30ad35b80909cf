"""What `manta launch` renders, against files that a person has read, and against what each target's API says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from manta.cli import main
from manta.config import Config
from manta.errors import ConfigError, UserError
from manta.launch import job, kuberay, sagemaker
from manta.launch.config import LaunchConfig
from manta.launch.rendered import refuse_secrets
from manta.launch.sagemaker_api import check
from manta.launch.sagemaker_entry import decoded

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
SCHEMA = ROOT.parent / "shared" / "schemas" / "RayJob-v1.json"
RECIPE = ROOT / "recipes" / "launch.yaml"
CANARY = "hf_canaryInTheEnvironmentAtLaunch"

# File of golden/launch → arguments. The recipe is one; the target is the word that changes.
CASES = {
    "rayjob.yaml": ["kubernetes"],
    "rayjob-elastic.yaml": ["kubernetes", "--nodes", "1:4", "--retries", "5", "--max_run_hours", "48"],
    "rayjob-claim.yaml": ["kubernetes", "--claim", "models", "--results_dir", "/data/runs", "--queue", "gpus"],
    "rayjob-hyperpod.yaml": ["hyperpod", "--team", "nlp", "--fsx_claim", "fsx", "--results_dir", "/data/runs"],
    "job.sbatch": ["hyperpod", "--orchestrator", "slurm", "--results_dir", "/fsx/runs", "--partition", "gpu",
                   "--secrets", '{"HF_TOKEN": "/fsx/secrets/hf"}', "--python", "/fsx/manta/bin/python"],
    "training-job.json": ["sagemaker", "--job_name", "numbers-1"],
    "training-job-spot.json": [
        "sagemaker", "--job_name", "numbers-2", "--spot", "--max_run_hours", "12", "--nodes", "1",
        "--sync_checkpoints", "s3://bucket/checkpoints", "--channels", '{"train": "s3://bucket/data"}',
        "--subnets", '["subnet-0a"]', "--security_groups", '["sg-0a"]', "--tags", '{"team": "nlp"}',
    ],
    "training-job-groups.json": [
        "sagemaker", "--job_name", "numbers-3", "--keep_alive_minutes", "30",
        "--instance_groups", '{"big": "1 × ml.p5.48xlarge", "more": "2 × ml.p5.48xlarge"}',
    ],
    "endpoint.json": ["sagemaker", "--endpoint", "--region", "us-east-1"],
    "ray-job.json": ["ray"],
}  # fmt: skip


def rendered(*arguments: str) -> str:
    """What `--dry_run` prints."""
    done = CliRunner().invoke(main, ["launch", *arguments, "--config", str(RECIPE), "--dry_run"])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["launch", *arguments, "--config", str(RECIPE), "--dry_run"])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)


@pytest.mark.parametrize("name", CASES)
def test_each_target_renders_what_is_on_file(name):
    """MANTA_GOLDEN=write replaces the files: read the difference before you commit it."""
    text = rendered(*CASES[name]).replace(version("ray"), "RAY-VERSION")
    if os.environ.get("MANTA_GOLDEN") == "write":
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()
    assert CANARY not in text


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The CRD's schema, which Kubernetes prunes by, as one that refuses what would be pruned."""
    if "properties" in schema:
        schema = {"additionalProperties": False, **schema}
    known = ("properties", "items", "additionalProperties")
    return {
        key: (
            {name: strict(each) for name, each in value.items()} if key == "properties"
            else strict(value) if key in known and isinstance(value, dict)
            else value
        )
        for key, value in schema.items()
    }  # fmt: skip


@pytest.mark.skipif(not SCHEMA.exists(), reason="KubeRay's CRD schemas are not here (shared/schemas)")
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rayjob")])
def test_manifests_are_what_the_crd_knows(name):
    schema = strict(json.loads(SCHEMA.read_text()))
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    schema["properties"]["spec"]["required"] = ["entrypoint", "rayClusterSpec"]
    manifest = yaml.safe_load(rendered(*CASES[name]))
    jsonschema.validate(manifest, schema)
    assert manifest["apiVersion"] == "ray.io/v1" and manifest["kind"] == "RayJob"
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1  # a key that would be pruned
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(manifest, schema)
    manifest = yaml.safe_load(rendered(*CASES[name]))
    manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"][0]["valu"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="valu"):
        jsonschema.validate(manifest, schema)


def manifest(*arguments: str) -> dict[str, Any]:
    return yaml.safe_load(rendered("kubernetes", *arguments))


def recipe_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the driver on the head is given."""
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return yaml.safe_load(next(each["value"] for each in head["env"] if each["name"] == "MANTA_RECIPE"))


@pytest.mark.parametrize(
    ("breach", "says"),
    [
        (lambda m: m["metadata"].update(name="x" * 48), "at most 47"),
        (lambda m: m["metadata"].update(name="1st"), "a letter first"),
        (lambda m: m["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "strings"),
        (lambda m: m["spec"]["rayClusterSpec"].update(rayVersion="2.9.0"), "Ray 2.52"),
        (lambda m: m["spec"].update(backoffLimit=-1), "negative"),
        (lambda m: m["spec"].update(ttlSecondsAfterFinished=1, shutdownAfterJobFinishes=False), "ttlSeconds"),
        (lambda m: m["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=3), "minReplicas"),
        (lambda m: m["spec"]["rayClusterSpec"]["workerGroupSpecs"].append(
            m["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]), "one name"),
    ],
)  # fmt: skip
def test_the_operators_rules_are_checked_here(breach, says):
    broken = manifest()
    kuberay.check(broken)
    breach(broken)
    with pytest.raises(UserError, match=says):
        kuberay.check(broken)


def test_an_attempt_of_a_rayjob_has_the_same_run_and_the_name_fits():
    first, again = manifest(), manifest("--retries", "7")
    assert recipe_of(first) == recipe_of(again) and again["spec"]["backoffLimit"] == 7
    assert recipe_of(first)["run_name"] == "qwen3-8b-dolly"
    unnamed = job.placed(Config(), LaunchConfig(), 8)
    assert unnamed.run_name == job.default_name(Config()) and unnamed.num_workers == 8
    assert not set(first["spec"]["entrypoint"]) & set("&|;'\"$\\\n")  # two shells read it
    long = manifest("--run_name", "A_very.long-" * 6)
    assert len(long["metadata"]["name"]) <= 47 and re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", long["metadata"]["name"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["kubernetes", "--results_dir", "results"], "results_dir results would be lost"),
        (["kubernetes", "--claim", "c", "--results_dir", "/elsewhere"], "a folder below /data"),
        (["kubernetes", "--nodes", "1:4", "--queue", "gpus"], "Kueue admits a fixed number"),
        (["kubernetes", "--hfdc_dataset_name", str(RECIPE)], "is on this machine"),
        (["kubernetes", "--job_name", "Upper"], "lower-case"),
        (["kubernetes", "--memory", "lots"], "launch.kubernetes.memory"),
        (["sagemaker", "--results_dir", "results"], "results_dir results would be lost"),
        (["sagemaker", "--secrets", "{}"], "--open_ray"),
        (["sagemaker", "--job_name", "not_this"], "launch.sagemaker.job_name"),
        (["sagemaker", "--role_arn", "arn:aws:iam::1:role/x"], "RoleArn"),
        (["sagemaker", "--instance_type", "ml.p4d.25xlarge"], "is not known here"),
        (["sagemaker", "--instance_type", "ml.p4d.25xlarge", "--num_workers", "16"], "SageMaker knows no ml.p4d.25"),
        (["sagemaker", "--nodes", "2", "--sync_checkpoints", "s3://b/c"], "is for one instance"),
        (["sagemaker", "--spot", "--keep_alive_minutes", "5"], "no warm pool"),
        (["sagemaker", "--subnets", '["subnet-1"]'], "both subnets and security_groups"),
        (["sagemaker", "--nodes", "1:2"], "fixed number of instances"),
        (["sagemaker", "--channels", '{"train": "data.jsonl"}'], "give s3://bucket/folder"),
        (["sagemaker", "--endpoint"], "follows from the region"),
        (["hyperpod", "--instance_type", "ml.p4d.24xl"], "ml.p4d.24xlarge"),
        (["hyperpod", "--orchestrator", "slurm", "--nodes", "1:2"], "fixed number of nodes"),
        (["hyperpod", "--orchestrator", "slurm", "--secrets", '{"HF_TOKEN": "hub#token"}'], "is a file"),
        (["kubernetes", "--env", '{"HF_TOKEN": "abc"}'], "HF_TOKEN would be written down"),
        (["kubernetes", "--secrets", '{"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz"}'], "looks like the secret itself"),
        (["kubernetes", "--nodes", "0"], "launch.nodes"),
    ],
)  # fmt: skip
def test_what_a_target_would_refuse_is_a_message_here(arguments, says):
    output = refused(*arguments)
    assert says in output
    assert "hf_abcdef" not in output


def test_a_secret_of_this_process_never_leaves_it(tmp_path):
    """Not by a setting of the run, nor by one of the launch; the message names the variable and not its value."""
    for arguments in (
        ["--lora_target_modules", CANARY],
        ["--run_name", CANARY],
        ["--env", json.dumps({"NOTE": CANARY})],
    ):
        for target in ("ray", "kubernetes", "sagemaker"):
            done = CliRunner().invoke(
                main, ["launch", target, "--config", str(RECIPE), *arguments, "--output_dir", str(tmp_path / "out")]
            )
            assert done.exit_code == 2 and CANARY not in done.output, done.output
            assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="value of WANDB_API_KEY") as refusal:
        refuse_secrets({"x.yaml": "a 0123456789 b"}, {"WANDB_API_KEY": "0123456789", "HOME": "a"})
    assert "0123456789" not in str(refusal.value)
    refuse_secrets({"x.yaml": "true /path"}, {"SOME_TOKEN": "true", "TOKEN_PATH": "/path"})


def test_output_dir_writes_and_submits_nothing(tmp_path):
    arguments = ["launch", "kubernetes", "--config", str(RECIPE), "--output_dir", str(tmp_path / "k8s")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "k8s" / "rayjob.yaml").read_text() == rendered("kubernetes")


def test_a_typo_in_the_section_names_the_nearest(tmp_path):
    for text, says in (
        ("launch: {imag: x}", "launch.imag. Did you mean image"),
        ("launch: {sagemaker: {role: x}}", "launch.sagemaker.role. Did you mean role_arn"),
        ("launch: [x]", "must be a mapping"),
        ("launch: {nodes: many}", "launch.nodes"),
    ):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
        with pytest.raises(ConfigError, match=says):
            LaunchConfig.of(recipe, "sagemaker", {})
    assert Config.load(recipe) == Config()  # where it runs is no setting of the run


def test_flags_win_over_the_section_and_go_where_they_belong():
    settings = LaunchConfig.of(RECIPE, "hyperpod", {"nodes": "3", "namespace": "mine", "team": "nlp"})
    assert settings.nodes == 3 and settings.kubernetes.namespace == "mine" and settings.hyperpod.team == "nlp"
    assert settings.image == LaunchConfig.of(RECIPE, "ray", {}).image


def test_flags_give_the_same_config_back():
    """What is sent as hyperparameters or as a command line is the recipe, whatever its types."""
    from manta.cli import config_from_flags

    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        config = Config.load(recipe)
        assert Config.from_dict(yaml.safe_load(job.recipe(config))) == config
        assert config_from_flags(dict(job.flags(config))) == config
        sent = {name: decoded(sagemaker.encoded(value)) for name, value in job.flags(config).items()}
        assert config_from_flags(sent) == config
        assert all("\n" not in value for value in job.flags(config).values())


def test_hyperparameters_of_the_guides_estimator_are_understood():
    assert [decoded(value) for value in ('"Qwen/Qwen3-8B"', "10000", "Qwen/Qwen3-8B", '{"a": 1}', "true")] == [
        *("Qwen/Qwen3-8B", "10000", "Qwen/Qwen3-8B", '{"a": 1}', "true")
    ]


def test_requests_are_compared_with_what_botocore_leaves_to_the_service():
    request = json.loads(rendered(*CASES["training-job.json"]))
    check("create_training_job", request)
    for name, value, says in (
        ("TrainingJobName", "under_score", "does not match"),
        ("TrainingJobName", "x" * 64, "at most 63"),
        ("Tagz", [], "Unknown parameter"),
        ("HyperParameters", {str(number): "x" for number in range(101)}, "101 entries"),
        ("HyperParameters", {"a": "x" * 2501}, "at most 2500"),
        ("ResourceConfig", {"InstanceType": "ml.p9.huge", "InstanceCount": 1}, "knows no ml.p9.huge"),
    ):
        with pytest.raises(UserError, match=says):
            check("create_training_job", {**request, name: value})


def test_help_of_each_target_lists_its_settings():
    for target in ("ray", "sagemaker", "kubernetes", "hyperpod"):
        text = CliRunner().invoke(main, ["launch", target, "--help"], terminal_width=300).output
        assert "--dry_run" in text and "--image" in text and "--learning_rate" in text


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """What boto3 is given and what it sends, against moto's SageMaker."""
    import boto3
    from moto import mock_aws

    found: dict[str, list[Any]] = {"parameters": [], "bodies": []}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing-credentials")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        boto3.setup_default_session()
        events = boto3.DEFAULT_SESSION.events
        events.register(
            "before-parameter-build.sagemaker",
            lambda params, model, **_: found["parameters"].append((model.name, dict(params))),
        )
        events.register("before-send.sagemaker", lambda request, **_: found["bodies"].append(request.body))
        yield found


def test_the_training_job_that_is_sent_is_the_one_that_is_shown(sent):
    import boto3

    shown = json.loads(rendered(*CASES["training-job-spot.json"]))
    arguments = [*CASES["training-job-spot.json"], "--config", str(RECIPE)]
    done = CliRunner().invoke(main, ["launch", *arguments])
    assert done.exit_code == 0, done.output
    assert "arn:aws:sagemaker:us-east-1" in done.output and "aws logs tail" in done.output
    assert sent["parameters"] == [("CreateTrainingJob", shown)]
    (body,) = sent["bodies"]
    assert json.loads(body) == shown and CANARY.encode() not in body
    there = boto3.client("sagemaker").describe_training_job(TrainingJobName="numbers-2")
    assert there["HyperParameters"] == shown["HyperParameters"] and there["RoleArn"] == shown["RoleArn"]
    assert shown["CheckpointConfig"]["S3Uri"] == "s3://bucket/checkpoints" and shown["EnableManagedSpotTraining"]
    assert shown["VpcConfig"] == {"Subnets": ["subnet-0a"], "SecurityGroupIds": ["sg-0a"]}


def test_an_endpoint_is_made_in_three_calls(sent):
    import boto3

    arguments = [*CASES["endpoint.json"], "--endpoint_instance_type", "ml.g4dn.xlarge"]
    shown = json.loads(rendered(*arguments))
    done = CliRunner().invoke(main, ["launch", *arguments, "--config", str(RECIPE)])
    assert done.exit_code == 0, done.output
    assert [name for name, _ in sent["parameters"]] == ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
    assert [parameters for _, parameters in sent["parameters"]] == list(shown.values())
    name = shown["create_endpoint"]["EndpointName"]
    assert boto3.client("sagemaker").describe_endpoint(EndpointName=name)["EndpointConfigName"] == name
    source = shown["create_model"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    assert source["S3Uri"] == "s3://bucket/runs/qwen3-8b-dolly/export/"

    for arguments, place in (
        (["--job_name", "numbers-1"], "s3://bucket/runs/sagemaker/numbers-1/output/model/"),
        (["--model_data", "s3://other/model"], "s3://other/model/"),
    ):
        model = json.loads(rendered(*CASES["endpoint.json"], *arguments))["create_model"]["PrimaryContainer"]
        assert model["ModelDataSource"]["S3DataSource"]["S3Uri"] == place
    newer = [*CASES["endpoint.json"], "--endpoint_name", "newer"]  # of a type that moto's SageMaker does not know
    done = CliRunner().invoke(main, ["launch", *newer, "--config", str(RECIPE)])
    assert done.exit_code == 2 and "SageMaker refused create_endpoint_config" in done.output


def test_kubectl_is_given_the_manifest_that_is_shown(tmp_path, monkeypatch):
    """A stand-in for kubectl, which needs a cluster."""
    stand_in = tmp_path / "kubectl"
    stand_in.write_text(
        f'#!/bin/sh\ncat > {tmp_path}/given; echo "$@" > {tmp_path}/arguments; echo applied; exit $CODE\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for code in ("0", "1"):
        monkeypatch.setenv("CODE", code)
        done = CliRunner().invoke(main, ["launch", "kubernetes", "--config", str(RECIPE)])
        assert done.exit_code == (0 if code == "0" else 2), done.output
        assert (tmp_path / "given").read_text() == rendered("kubernetes")
        assert (tmp_path / "arguments").read_text() == "apply -f -\n"
    assert "kubectl apply refused" in done.output


@pytest.mark.parametrize("asked", [True, False], ids=["asked to stop", "undisturbed"])
def test_the_sbatch_script_turns_a_signal_into_the_file_and_keeps_the_steps_exit_code(asked, tmp_path, monkeypatch):
    """Run by bash, with a stand-in for srun whose step ends when the file is there, or by itself."""
    script = rendered("hyperpod", "--orchestrator", "slurm", "--secrets", "{}", "--results_dir", "/fsx/runs",
                      "--python", "python-of-the-test")  # fmt: skip
    (tmp_path / "srun").write_text(
        '#!/bin/bash\n[ "$1" = --auto-resume=1 ] || exit 9\n[ ${#RAY_AUTH_TOKEN} = 64 ] || exit 8\ntouch started\n'
        + ('while [ ! -e "$MANTA_STOP_FILE" ]; do sleep 0.1; done; sleep 0.3; exit 75\n' if asked else "exit 0\n")
    )
    (tmp_path / "python-of-the-test").write_text('#!/bin/bash\necho "$@" > converted\n')
    for name in ("srun", "python-of-the-test"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    step = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment)
    limit = time.monotonic() + 30
    while asked and not (tmp_path / "started").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    if asked:
        step.send_signal(signal.SIGTERM)
    assert step.wait(30) == (75 if asked else 0)
    assert not (tmp_path / ".stop-7").exists()
    assert (tmp_path / "converted").exists() is not asked


def test_ray_over_ssh_has_one_token_which_is_in_no_command(tmp_path, monkeypatch):
    """With a stand-in for ssh that notes what each host is told and what it reads."""
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/$1.command\ncat > {tmp_path}/$1.input\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    script = ROOT / "recipes" / "ray-cluster.sh"
    started = subprocess.run([script, "start", "node-1", "node-2"], capture_output=True, text=True, check=True)
    tokens = {(tmp_path / f"{host}.input").read_text() for host in ("node-1", "node-2")}
    (token,) = tokens
    commands = [(tmp_path / f"{host}.command").read_text() for host in ("node-1", "node-2")]
    assert len(token) == 64 and token not in "".join(commands) + started.stdout
    assert "ray start --head --port 6379" in commands[0] and "ray start --address node-1:6379" in commands[1]
    assert all("RAY_AUTH_MODE=token" in command and "umask 077" in command for command in commands)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine")
    subprocess.run([script, "start", "node-1"], check=True, capture_output=True)
    assert (tmp_path / "node-1.input").read_text() == "mine"
    subprocess.run([script, "stop", "node-1", "node-2"], check=True, stdin=subprocess.DEVNULL)
    assert all((tmp_path / f"{host}.command").read_text().endswith("ray stop\n") for host in ("node-1", "node-2"))
    assert subprocess.run([script, "restart", "node-1"], capture_output=True).returncode == 2


def test_the_image_is_made_of_what_is_here():
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \./", text, re.M)
    names = " ".join(copied).split()
    assert names and all((ROOT / name).exists() for name in names)
    ignored = (ROOT / ".dockerignore").read_text()
    assert all(f"!{name}\n" in ignored for name in names)
    extras = re.search(r"'\.\[(.+)\]'", text)
    defined = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras and set(extras[1].split(",")) <= set(defined)
    module = ".".join(sagemaker.ENTRY[-1:])
    assert module in text and (ROOT / "src" / module.replace(".", "/")).with_suffix(".py").exists()
