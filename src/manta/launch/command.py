"""`manta launch TARGET`: flags of the target, and every flag of `manta train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic.fields import FieldInfo

from manta.config import Config

ABOUT = {
    "ray": "Train on a Ray cluster that is there already, by Ray's Jobs API.",
    "sagemaker": "Train as a job of SageMaker; with --endpoint, serve what was trained.",
    "kubernetes": "Train as a RayJob of KubeRay.",
    "hyperpod": "Train on SageMaker HyperPod, on EKS or Slurm.",
}


def launch_group(
    training: Sequence[click.Parameter],
    option: Callable[[str, FieldInfo], click.Option],
    config_from_flags: Callable[[dict[str, Any]], Config],
) -> click.Group:
    """The verb, given the flags of `manta train` and how flags are made and read."""
    group = click.Group("launch", help="Run a recipe somewhere else: see what would run, check it, submit it.")
    for target, about in ABOUT.items():
        group.add_command(_command(target, about, training, option, config_from_flags))
    return group


def _command(
    target: str,
    about: str,
    training: Sequence[click.Parameter],
    option: Callable[[str, FieldInfo], click.Option],
    config_from_flags: Callable[[dict[str, Any]], Config],
) -> click.Command:
    from manta.launch.config import SECTIONS, SHARED, LaunchConfig, sections

    fields = {name: LaunchConfig.model_fields[name] for name in SHARED}
    fields |= {name: SECTIONS[section].model_fields[name] for name, section in sections(target).items()}
    own = [
        click.Option(["--dry_run"], is_flag=True, help="Show what would run; write and submit nothing"),
        click.Option(["--output_dir"], metavar="FOLDER", help="Write the files there; submit nothing"),
        *(option(name, field) for name, field in fields.items()),
    ]
    if target == "sagemaker":
        own.append(click.Option(["--endpoint"], is_flag=True, help="An endpoint for the model, not a training job"))

    def run(dry_run: bool, output_dir: str | None, endpoint: bool = False, **flags: Any) -> None:
        from manta.launch.rendered import write
        from manta.launch.targets import ENDPOINT, TARGETS, rendered

        ours = {name: flags.pop(name) for name in fields}
        given = {name: value for name, value in ours.items() if value is not None}
        settings = LaunchConfig.of(flags.get("config"), target, given)
        config = config_from_flags(flags)
        chosen = ENDPOINT if endpoint else TARGETS[target]
        files = rendered(chosen, config, settings)
        if dry_run:
            for name, text in files.items():
                click.echo(f"# {name}", err=True)
                click.echo(text, nl=False)
        elif output_dir:
            write(files, Path(output_dir))
            click.echo("\n".join(str(Path(output_dir) / name) for name in files))
        else:
            click.echo(chosen.submit(files, settings))

    taken = {parameter.name for parameter in own}
    rest = [parameter for parameter in training if parameter.name not in taken]
    return click.Command(target, callback=run, params=[*own, *rest], help=about)
