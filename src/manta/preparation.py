"""The stage of preparation as a command runs it: made if it is not there, shown while it is made, judged at the end."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from manta import cluster, storage
from manta.config import Config, whole_path
from manta.data import formats, lint, prepare, tokenize
from manta.data.prepare import Prepared
from manta.data.shards import Job
from manta.errors import UserError
from manta.progress import say

SHARDS_HERE = 2  # up to so many are prepared in this process: sooner done than Ray starts a worker


def prepare_only(config: Config, console: Console | None = None) -> Path:
    """Prepare the data of `config` and return its folder; at once if it is there already. Raises UserError.

    What looks wrong about the data is said, and left to `train` to refuse.
    """
    console = console or Console(stderr=True, highlight=False)
    prepared = prepared_by(config, console)
    for finding in lint.findings(prepared.counts, config.lint, config.objective):
        _say_finding(console, finding)
    return prepared.path


def prepared_by(config: Config, console: Console | None = None) -> Prepared:
    """The prepared data of `config`, made if it is not there."""
    console = console or Console(stderr=True, highlight=False)
    config = absolute(config)
    prepared, parts = prepare.locate(config)
    if not prepare.is_ready(prepared):
        job = prepare.open_job(config, prepared)
        with ExitStack() as stack:
            stack.callback(prepare.forget_sources, prepared)
            if job.shards > SHARDS_HERE:
                tokenize.import_in_background()
                stack.enter_context(cluster.connected(config))
            make(config, prepared, parts, job, console)
    return prepared


def check_data(config: Config, prepared: Prepared, console: Console) -> None:
    """Say what looks wrong about the data. Raises UserError if the config calls any of it an error."""
    counts = prepared.counts
    found = lint.findings(counts, config.lint, config.objective)
    errors = [str(finding) for finding in found if finding.level == "error"]
    if counts["quarantined"] > config.bad_rows_limit * counts["rows"]:  # prepared when more were allowed
        errors.append(
            f"{counts['quarantined']:,} of {counts['rows']:,} rows cannot be used, over bad_rows_limit "
            f"{config.bad_rows_limit:g}: {prepared.path / prepare.QUARANTINE}. Mend them, or raise --bad_rows_limit."
        )
    for finding in found:
        if finding.level == "warning":
            _say_finding(console, finding)
    if errors:
        raise UserError("\n".join([*errors, f"See it: manta inspect --prepared {prepared.path}"]))


def absolute(config: Config) -> Config:
    """Local folders by their whole path, so that the saved config works from anywhere.

    Where results go to a store and nothing is said about the data, it goes there too: other nodes must find it.
    """
    data = config.hf_dataset_config
    return config.model_copy(
        update={
            "hf_model_id": whole_path(config.hf_model_id),
            "results_dir": str(storage.place(config.results_dir)),
            "data_dir": str(storage.place(_data_dir(config))),
            "chat_template": config.chat_template and whole_path(config.chat_template),
            "hf_dataset_config": data.model_copy(
                update={
                    "dataset_name": whole_path(data.dataset_name),
                    "mixture": tuple(
                        {**part, "dataset_name": whole_path(part["dataset_name"])} for part in data.mixture
                    ),
                }
            ),
        }
    )


def _data_dir(config: Config) -> str:
    is_default = config.data_dir == Config.model_fields["data_dir"].default
    return f"{config.results_dir}/prepared" if is_default and storage.is_remote(config.results_dir) else config.data_dir


def make(config: Config, prepared: Prepared, parts: dict[str, Any], job: Job, console: Console) -> None:
    start = time.time()
    for each, found in zip(job.sources, job.formats, strict=True):
        say(console, f"prepare: {each.config.dataset_name}: {formats.describe(found, each)}")
    with console.status("prepare: starting") as status:

        def show(done: int, total: int) -> None:
            status.update(f"prepare: {done:,}/{total:,} rows, {done / (time.time() - start):,.0f} rows/s")

        prepare.prepare(config, prepared, parts, job, show, here=job.shards <= SHARDS_HERE)
    counts = prepared.counts
    splits = ", ".join(f"{counts[split]['rows']:,} {split}" for split in ("training", "validation", "test"))
    seconds = time.time() - start
    tokens = sum(counts[split]["tokens"] for split in ("training", "validation"))
    say(
        console,
        f"prepare: {job.rows:,} rows in {seconds:.1f} s → {splits}; {tokens:,} tokens, {tokens / seconds:,.0f}/s",
    )
    for reason, about in counts["noted"].items():
        if reason not in lint.MEANING:
            say(console, f"prepare: {reason}: {about['rows']:,} rows, the first {about['first']}")
    if counts["quarantined"]:
        say(console, f"prepare: {counts['quarantined']:,} bad rows are put aside: {prepared.path / prepare.QUARANTINE}")


def _say_finding(console: Console, finding: lint.Finding) -> None:
    console.print(f"{finding.level}: {finding}", markup=False, soft_wrap=True)
