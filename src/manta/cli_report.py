"""`manta report`: the page of a run; `manta runs compare`: several beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from manta.cli_options import BASE_MODEL, CHECKPOINTS_DIR, FULL_FT, RUN, console, run_of


@click.command()
@RUN
@BASE_MODEL
@CHECKPOINTS_DIR
@FULL_FT
@click.option("--html", metavar="FILE", help="Where to write; default: report.html in the run's folder")
def report(
    run: str | None, base_model: str | None, checkpoints_dir: str, full_ft: bool | None, html: str | None
) -> None:
    """Write a run's page: settings, data, curves, what happened, checkpoints, lineage, and what to type next.

    `manta train` writes it at its end; this does for a run that is under way, was killed, or failed.
    """
    from manta import run_page

    found = run_of(run, base_model, checkpoints_dir, full_ft)
    click.echo(run_page.write(found, Path(html).absolute() if html else None))


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN [RUN…]")
@click.option("--html", metavar="FILE", help="Write a page with curves over each other, too")
def compare(runs: tuple[str, ...], html: str | None) -> None:
    """What two or more runs differ in, and what came of it."""
    from manta import compare as stage

    comparison = stage.compare(runs)
    stage.show(comparison, console())
    if html:
        stage.write_html(comparison, Path(html).absolute())
        click.echo(f"page: {html}")
