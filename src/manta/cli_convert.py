"""`manta convert`: its flags, and which checkpoint they mean."""

from __future__ import annotations

import click

from manta.cli_options import BASE_MODEL, CHECKPOINTS_DIR, FULL_FT, RUN


@click.command()
@RUN
@BASE_MODEL
@CHECKPOINTS_DIR
@FULL_FT
@click.option("--checkpoint", default="best", metavar="best|latest|STEP", help="Which checkpoint  ['best']")
@click.option("--checkpoint_dir", metavar="FOLDER", help="A checkpoint that the guide's code wrote, instead of a run")
@click.option("--output_dir", metavar="FOLDER", help="Where to write; default: export (or adapter) in the run's folder")
@click.option("--no_merge", type=bool, is_flag=False, flag_value=True, default=False, help="Keep a LoRA adapter apart")
@click.option("--max_shard_size", default="50GB", help="Largest weights file, such as 5GB  ['50GB']")
@click.option(
    "--verify",
    type=bool,
    is_flag=False,
    flag_value=True,
    default=True,
    help="Compare logits with the trained model's, and write nothing where they differ  [True]",
)
@click.option("--push_to_hub", metavar="REPO", help="Upload, too, as you/name; the token is that of `hf auth login`")
@click.option(
    "--private", type=bool, is_flag=False, flag_value=True, default=False, help="Push as a private repository"
)
def convert(
    run: str | None,
    base_model: str | None,
    checkpoints_dir: str,
    full_ft: bool | None,
    checkpoint: str,
    checkpoint_dir: str | None,
    output_dir: str | None,
    no_merge: bool,
    max_shard_size: str,
    verify: bool,
    push_to_hub: str | None,
    private: bool,
) -> None:
    """Write a run's checkpoint as a Hugging Face model folder, merged and verified, with a model card."""
    from manta import hub, runs, storage
    from manta.convert import Options, push, write
    from manta.convert import convert as write_run
    from manta.errors import UserError
    from manta.trained import in_folder

    if push_to_hub:
        hub.check_account(push_to_hub)
    options = Options(not no_merge, max_shard_size, verify)
    output = storage.place(output_dir) if output_dir else None
    foreign = checkpoint_dir or (run if run and not (storage.place(run) / "config.yaml").is_file() else None)
    if foreign:
        trained = in_folder(foreign, base_model, checkpoint)
        if output is None:
            raise UserError(f"Say where the model of {trained.weights} goes: --output_dir.")
        written = write(trained, output, options)
    else:
        found = runs.open_run(run) if run else runs.find(checkpoints_dir, base_model, full_ft)
        written = write_run(found, output, not no_merge, checkpoint, options)
    click.echo(written)
    if push_to_hub:
        click.echo(push(written, push_to_hub, private))
