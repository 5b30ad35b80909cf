"""`manta serve` and `manta chat`: flags only; each verb imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from manta.errors import UserError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

RUNS = click.option(
    "--run", "runs", multiple=True, metavar="[NAME=]FOLDER", help="A run: its base, and its best checkpoint by its name"
)
MODELS = click.option(
    "--model", "models", multiple=True, metavar="[NAME=]FOLDER", help="A folder of `manta convert`, or a hub model"
)
NO_BASE = click.option(
    "--no_base", type=bool, is_flag=False, flag_value=True, default=False, help="Serve no base model with a run"
)
KEY_ENV = click.option("--api_key_env", metavar="NAME", help="Environment variable that holds the API key")
KEY_FILE = click.option("--api_key_file", metavar="FILE", help="File that holds the API key")
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute")
DTYPE = click.option(
    "--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", help="Precision  [auto]"
)
ADDRESS = click.option("--ray_address", metavar="TEXT", help="Cluster to join; default: one of Manta's own, here")


@click.command()
@RUNS
@MODELS
@NO_BASE
@click.option("--host", default="127.0.0.1", help="Address to listen at  ['127.0.0.1']")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, help="Port  [8000]")
@KEY_ENV
@KEY_FILE
@click.option(
    "--engine", type=click.Choice(["auto", "vllm", "transformers"]), default="auto", help="auto: vLLM where installed"
)
@DEVICE
@DTYPE
@click.option("--max_model_len", type=click.IntRange(2), help="Most tokens of prompt and answer; default: the model's")
@click.option("--max_batch", type=click.IntRange(1), default=32, help="Most answers generated at once  [32]")
@click.option(
    "--max_batch_tokens", type=click.IntRange(2), default=65_536, help="Most tokens of all those, as padded  [65536]"
)
@click.option("--max_concurrency", type=click.IntRange(1), default=128, help="Beyond these, 429  [128]")
@click.option("--max_body_bytes", type=click.IntRange(1), default=4 << 20, help="Largest request  [4194304]")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, help="Seconds for an answer  [600]")
@click.option("--drain", type=click.FloatRange(0), default=30.0, help="Seconds for what is under way at SIGTERM  [30]")
@ADDRESS
def serve(
    runs: tuple[str, ...],
    models: tuple[str, ...],
    no_base: bool,
    api_key_env: str | None,
    api_key_file: str | None,
    **options: Any,
) -> None:
    """Serve runs and models behind OpenAI's API, with a chat page, until SIGTERM or Ctrl-C.

    Base and adapters share one copy of the weights; clients choose by model name.
    """
    key = api_key(api_key_env, api_key_file)
    if key is None and options["host"] not in _LOOPBACK:
        raise UserError(
            f"--host {options['host']} is open to others, so it needs a key: --api_key_env NAME or --api_key_file FILE."
        )
    from manta.serving.catalog import catalog
    from manta.serving.deploy import Plan
    from manta.serving.deploy import serve as serve_models
    from manta.serving.service import Settings, digest

    settings = Settings(
        key_sha256=digest(key) if key else None,
        hosts=("127.0.0.1", "localhost", "::1") if options["host"] in _LOOPBACK else (),
        timeout_s=options.pop("timeout"),
        **{name: options.pop(name) for name in ("max_body_bytes", "max_model_len", "max_concurrency")},
    )
    plan = Plan(settings=settings, drain_s=options.pop("drain"), **options)
    served = catalog(runs, models, not no_base)

    def ready(url: str) -> None:
        names = ", ".join(model.name for weights in served for model in weights.models)
        click.echo(f"Serving {names} at {url} (API: {url}/v1, chat page: {url}/). Ctrl-C or SIGTERM stops it.")

    if cut := serve_models(served, plan, ready):
        click.echo(f"manta: {cut} answers were cut off after {plan.drain_s:g} s.", err=True)


@click.command()
@click.argument("message", required=False)
@click.option("--url", metavar="URL", help="A server, such as http://127.0.0.1:8000; or --run or --model")
@RUNS
@MODELS
@click.option("--name", metavar="TEXT", help="Model to begin with; default: the tuned one")
@click.option("--system", metavar="TEXT", help="System message of conversations")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="0: the likeliest token  [0]")
@click.option("--max_tokens", type=click.IntRange(1), default=256, help="Most tokens of an answer  [256]")
@click.option("--seed", type=int, help="Draw the same answer again")
@KEY_ENV
@KEY_FILE
@DEVICE
@DTYPE
def chat(
    message: str | None,
    url: str | None,
    runs: tuple[str, ...],
    models: tuple[str, ...],
    api_key_env: str | None,
    api_key_file: str | None,
    device: str,
    dtype: str,
    **options: Any,
) -> None:
    """Talk to base and tuned in the terminal: one MESSAGE, or line by line, also from a pipe.

    /base and /tuned switch, /both asks both, /model NAME chooses, /new forgets, /quit ends. A model that was not
    tuned on conversations gets a line as it is, with \\n as a line's end.
    """
    if bool(url) == bool(runs or models):
        raise UserError("Give either --url of a server, or --run and --model to be served right here.")
    from manta.serving import chat as room

    if url:
        source: Any = room.remote(url, api_key(api_key_env, api_key_file))
    else:
        from manta.serving.catalog import catalog

        source = room.local(catalog(runs, models), device, dtype)
    lines = [message] if message is not None else room.typed(sys.stdin)
    with source as talker:
        room.converse(talker, lines, **options)


def api_key(variable: str | None, file: str | None) -> str | None:
    """The key that an environment variable or a file holds. Raises UserError if it is named and not there."""
    if variable and file:
        raise UserError("Give one of --api_key_env and --api_key_file.")
    if variable:
        # Taken out, so that no process that starts from here has it.
        key = os.environ.pop(variable, "").strip()
        missing = f"--api_key_env {variable}, but there is no such variable, or it is empty. export {variable}=… first."
    elif file:
        try:
            key = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"--api_key_file {file} cannot be read: {error.strerror}.") from error
        missing = f"--api_key_file {file} is empty."
    else:
        return None
    if not key:
        raise UserError(missing)
    return key
