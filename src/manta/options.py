"""Flags that several verbs have in common."""

from __future__ import annotations

import click

RUN = click.option(
    "--run", metavar="FOLDER", help="The run; default: the only one of --base_model in --checkpoints_dir"
)
BASE_MODEL = click.option("--base_model", metavar="TEXT", help="The model that was tuned, as it was given to train")
CHECKPOINTS_DIR = click.option("--checkpoints_dir", default="results", help="Folder of all runs  ['results']")
FULL_FT = click.option(
    "--full_ft", type=bool, is_flag=False, flag_value=True, help="Look at full fine-tuning runs only"
)
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute")
