"""Options that several verbs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from manta import quiet

if TYPE_CHECKING:
    from manta.runs import Run

RUN = click.option(
    "--run", metavar="FOLDER", help="The run; default: the only one of --base_model in --checkpoints_dir"
)
BASE_MODEL = click.option("--base_model", metavar="TEXT", help="The model that was tuned, as it was given to train")
CHECKPOINTS_DIR = click.option("--checkpoints_dir", default="results", help="Folder of all runs  ['results']")
FULL_FT = click.option(
    "--full_ft", type=bool, is_flag=False, flag_value=True, help="Look at full fine-tuning runs only"
)


def _speak_up(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        quiet.speak_up()


VERBOSE = click.Option(
    ["--verbose"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_speak_up,
    help="Show what libraries and workers print, too; without it, that is in the run's logs",
)


def run_of(run: str | None, base_model: str | None, checkpoints_dir: str, full_ft: bool | None) -> Run:
    """The run that these options name. Raises UserError if there is none, or more than one."""
    from manta import runs

    return runs.open_run(run) if run else runs.find(checkpoints_dir, base_model, full_ft)


def console(stderr: bool = False) -> Any:
    """Where verbs print what was asked for; with `stderr`, what they are doing."""
    from rich.console import Console

    return Console(highlight=False, stderr=stderr)
