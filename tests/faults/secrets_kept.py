"""Secrets in the environment and in the settings: in no file that a run leaves."""

from __future__ import annotations

from faults.bench import Bench
from faults.inputs import quick, refused
from running import CANARY

SECRETS = "secrets (canary tokens in env and config)"


def secrets(bench: Bench) -> None:
    """After the other scenarios: their jobs had the secrets in the environment, some crashed, some were killed."""
    with bench.row(SECRETS, "in the environment of every process of every job") as row:
        bench.reference()
        row.must(not bench.leaks, f"found in {bench.leaks[:5]}")
    folder = bench.folder / "url"
    folder.mkdir()
    with bench.row(SECRETS, "a password in the data's URL: refused, not repeated") as row:
        before = len(bench.leaks)
        config = quick(folder, "url")
        url = f"http://user:{CANARY}@127.0.0.1:9/rows.jsonl"
        said = refused(bench, row, config, folder, "--hfdc_dataset_name", url)
        row.must("holds a password" in said, f"it says {said}")
        row.must(CANARY not in said and len(bench.leaks) == before, f"found in {bench.leaks[before:][:5]}")
