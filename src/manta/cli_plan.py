"""`manta plan`: the flags of `manta train`, and how the plan is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click

from manta.cli_options import console
from manta.config import Config


def plan_command(
    kind: type[click.Command],
    training: Sequence[click.Parameter],
    config_from_flags: Callable[[dict[str, Any]], Config],
) -> click.Command:
    """The verb, given how flags are shown, the flags of `manta train`, and how they are read."""
    own: list[click.Parameter] = [
        click.Option(["--json", "as_json"], is_flag=True, help="Print the plan as JSON, in bytes and hours"),
        click.Option(["--accelerators"], metavar="GPU,GPU", help="Compare GPU types, such as H100,A100-80G,L40S,A10G"),
        click.Option(
            ["--mfu"],
            type=click.FloatRange(0, 1, min_open=True),
            default=0.35,
            help="Share of a GPU's published peak that is reached, where nothing was measured  [0.35]",
        ),
        click.Option(
            ["--probe", "probed"],
            is_flag=True,
            help="Load the model and run three steps at full length here: what they take, and how fast they are",
        ),
    ]
    return kind("plan", callback=_plan(config_from_flags), params=[*own, *training], help=_HELP)


_HELP = """What a run would need and take, before it costs anything: memory part by part, steps, hours, disk.

Takes the settings of `manta train`. No weight is loaded and no worker started, but with --probe.
"""


def _plan(config_from_flags: Callable[[dict[str, Any]], Config]) -> Callable[..., None]:
    def run(as_json: bool, accelerators: str | None, mfu: float, probed: bool, **flags: Any) -> None:
        config = config_from_flags(flags)
        from manta.plan import plan

        found = plan(config, accelerators, mfu, probed)
        if as_json:
            click.echo(json.dumps(found, indent=2))
            return
        from manta.plan_table import show

        show(found, console())

    return run
