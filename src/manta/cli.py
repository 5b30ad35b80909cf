"""The command line: one verb per stage. Flags are made from the config's own fields, so that neither can drift.

Only what help needs is imported at the top; each verb imports its stage when it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from pydantic.fields import FieldInfo

from manta import __version__, diagnosis, imports, quiet
from manta.cli_convert import convert
from manta.cli_evaluate import evaluate
from manta.cli_options import VERBOSE, console
from manta.cli_plan import plan_command
from manta.cli_report import compare, report
from manta.cli_serve import chat, serve
from manta.config import Config, HFDatasetConfig
from manta.errors import TrainingError, UserError
from manta.launch.command import launch_group
from manta.recipe import merged, nested, read_recipe

# First field of each section of `manta train --help`.
SECTIONS = {
    "hf_model_id": "Model",
    "objective": "Training",
    "full_ft": "LoRA",
    "logging_steps": "Evaluation, early stopping, checkpoints",
    "data_dir": "Data",
    "hfdc_dataset_name": "Dataset",
    "device": "Ray and FSDP",
    "results_dir": "Output",
}


class SectionedCommand(click.Command):
    """Help with the options under headings, in the order of the config."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading = "Options"
        rows: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            if parameter.name in SECTIONS:
                self._section(formatter, heading, rows)
                heading, rows = SECTIONS[parameter.name], []
            if record := parameter.get_help_record(ctx):
                rows.append(record)
        self._section(formatter, heading, rows)

    @staticmethod
    def _section(formatter: click.HelpFormatter, heading: str, rows: list[tuple[str, str]]) -> None:
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


def option(name: str, field: FieldInfo) -> click.Option:
    """The flag of a config field. Values stay text: the config parses and checks them, and names what is wrong."""
    default = field.get_default(call_default_factory=True)
    shown = f"  [{default!r}]" if isinstance(default, str) else ""
    if isinstance(default, bool | int | float):
        shown = f"  [{default}]"
    if isinstance(default, bool):  # both `--full_ft` and `--full_ft False`
        return click.Option(
            [f"--{name}"], is_flag=False, flag_value="true", metavar="[BOOL]", help=f"{field.description}{shown}"
        )
    metavar = {int: "N", float: "X"}.get(type(default), "TEXT")
    return click.Option([f"--{name}"], metavar=metavar, help=f"{field.description}{shown}")


def config_options() -> list[click.Parameter]:
    options: list[click.Parameter] = [
        click.Option(["--config"], metavar="RECIPE.yaml", help="Settings from a YAML file; flags win over it")
    ]
    for name, field in Config.model_fields.items():
        if name == "hf_dataset_config":
            options += [option(f"hfdc_{nested}", about) for nested, about in HFDatasetConfig.model_fields.items()]
        else:
            options.append(option(name, field))
    return options


RESUME = click.Option(
    ["--resume"], metavar="FOLDER", help="Go on with the run in this folder, by its own settings; flags win over them"
)


def config_from_flags(flags: dict[str, Any], resumed: str | None = None) -> Config:
    """Defaults, then the recipe or the settings of the run that is `resumed`, then flags. Raises UserError."""
    given = {name: value for name, value in flags.items() if value is not None}
    recipe = given.pop("config", None)
    if resumed:
        from manta.runs import open_run

        run = open_run(resumed)
        for name in ("config", "run_name", "results_dir"):
            if flags.get(name) is not None:
                raise UserError(f"--resume names the run and its settings, so leave out --{name}.")
        recipe = str(run.config_file)
        given |= {"results_dir": str(run.path.parent), "run_name": run.name}
    return Config.from_dict(merged(read_recipe(recipe) if recipe else {}, nested(given)))


class Manta(click.Group):
    """Prints errors that are messages as messages, with the exit code they stand for."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"manta: {error}", err=True)
            ctx.exit(2)
        except TrainingError as error:
            click.echo(f"manta: {error}", err=True)
            ctx.exit(1)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # of a library, at work
            if (message := diagnosis.explain(error)) is None:
                raise
            click.echo(f"manta: {message}", err=True)
            ctx.exit(1)


@click.group(
    cls=Manta,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Start with: manta demo",
)
@click.version_option(__version__, prog_name="manta")
def main() -> None:
    """Fine-tune Hugging Face causal language models on Ray.

    The stages run in this order; each leaves a folder that the next one reads.
    """
    quiet.hush()
    imports.leave_quickly()


def _train(resume: str | None, **flags: Any) -> None:
    """Prepare data, fine-tune, keep the best checkpoint. The same command after a kill goes on where it was."""
    config = config_from_flags(flags, resume)
    from manta.outcome import exit_code
    from manta.report import print_summary
    from manta.run_page import left_behind
    from manta.train import train

    with left_behind(config):
        result = train(config)
        print_summary(result)
    sys.exit(exit_code(result))


def _prepare(**flags: Any) -> None:
    """Prepare data only: split, render and tokenize into a folder that `manta train` reuses."""
    config = config_from_flags(flags)
    from manta.preparation import prepare_only

    click.echo(prepare_only(config))


def _row_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    try:
        return [int(row) for row in value.split(",")] if value else []
    except ValueError as error:
        raise click.BadParameter("write source rows as 3,17") from error


def _inspect(prepared: str | None, samples: int, rows: list[int], split: str, html: str | None, **flags: Any) -> None:
    """Look at data before it costs anything: figures, what looks wrong, and samples with what is trained marked.

    Takes the settings of `manta train` and prepares first, or a prepared folder.
    """
    config = config_from_flags(flags)
    from manta import inspection, storage
    from manta.data.prepare import Prepared
    from manta.preparation import prepared_by

    folder = Prepared(storage.place(prepared)) if prepared else prepared_by(config)
    wanted = samples if html is None else max(samples, inspection.ON_PAGE)
    found = inspection.inspect(folder.fetched(), config, wanted, rows, split)
    inspection.show(found, console(), samples)
    if html:
        inspection.write_html(found, Path(html))
        click.echo(f"page: {html}")


INSPECT_OPTIONS: list[click.Parameter] = [
    click.Option(["--prepared"], metavar="FOLDER", help="A prepared folder, instead of settings"),
    click.Option(["--samples"], type=click.IntRange(0), default=3, help="Samples to show  [3]"),
    click.Option(
        ["--rows"], metavar="N,N", callback=_row_numbers, help="Show the samples of these source rows instead"
    ),
    click.Option(["--split"], type=click.Choice(["training", "validation"]), default="training", help="  [training]"),
    click.Option(["--html"], metavar="FILE", help="Write a page, too, with at least 50 samples"),
]

for _verb, _function, _options in (
    ("train", _train, [RESUME]),
    ("prepare", _prepare, []),
    ("inspect", _inspect, INSPECT_OPTIONS),
):
    _parameters = [*_options, VERBOSE, *config_options()]
    main.add_command(SectionedCommand(_verb, callback=_function, params=_parameters, help=_function.__doc__))


for _command in (convert, evaluate, report, serve, chat):
    main.add_command(_command)
for _command in (convert, evaluate):
    _command.params.append(VERBOSE)


@main.command(params=[VERBOSE])
@click.option("--folder", default="demo", help="Where everything goes  ['demo']")
@click.option("--num_workers", type=click.IntRange(1), default=2, help="Training workers  [2]")
def demo(folder: str, num_workers: int) -> None:
    """The whole of Manta in five minutes on two CPU cores, without any download.

    Makes a small base model, pre-trains it for a moment, fine-tunes it with LoRA on two workers with FSDP, merges, and
    compares base and tuned.
    """
    from manta.demo import run_demo

    run_demo(Path(folder), num_workers)


@main.group()
def runs() -> None:
    """What happened to runs, and whether their checkpoints are whole."""


@runs.command("list")
@click.argument("results_dir", default="results")
def runs_list(results_dir: str) -> None:
    """One line per run in a folder of runs."""
    from manta import history, storage

    history.print_runs(storage.place(results_dir), console())


@runs.command("show")
@click.argument("run")
def runs_show(run: str) -> None:
    """Settings, attempts, notes and checkpoints of a run."""
    from manta import history
    from manta.runs import open_run

    history.print_run(open_run(run), console())


@runs.command("watch")
@click.argument("run")
@click.option("--wait", is_flag=True, help="Wait for a run that has not begun, or not gone on")
def runs_watch(run: str, wait: bool) -> None:
    """Follow a run from another terminal or host; ends with it, and with its exit code. Ctrl-C leaves it running.

    0: finished, or stopped at the step that was asked for; 75: stopped by a signal; 1: failed, or its driver is gone.
    """
    from manta import watch

    sys.exit(watch.watch(watch.find(run, wait), console(stderr=True), console()))


runs.add_command(compare)


@runs.command("verify")
@click.argument("run")
def runs_verify(run: str) -> None:
    """Compare all files of a run's checkpoints with their hashes; exit 1 if any is not as it was written."""
    from manta import history
    from manta.runs import open_run

    sys.exit(history.verify(open_run(run), console()) > 0)


@runs.command("gc")
@click.argument("where", metavar="RUN|RESULTS_DIR", default="results")
@click.option("--dry_run", type=bool, is_flag=False, flag_value=True, default=False, help="Say what would go, only")
def runs_gc(where: str, dry_run: bool) -> None:
    """Delete unfinished and damaged checkpoints, ledgers of lost attempts, old copies here; not of a run in use."""
    from manta import garbage

    garbage.collect(where, dry_run, console())


main.add_command(plan_command(SectionedCommand, config_options(), config_from_flags))
main.add_command(launch_group(config_options(), option, config_from_flags))
