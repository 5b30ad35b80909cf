"""Secrets in the environment and in the settings: in no file that a run leaves."""

from __future__ import annotations

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from faults.bench import Bench
from faults.inputs import quick
from running import CANARY, write_rows

SECRETS = "secrets (canary tokens in env and config)"


class Guarded(SimpleHTTPRequestHandler):
    """Serves only those who know the secret."""

    def do_HEAD(self) -> None:
        self._answer(super().do_HEAD)

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def _answer(self, serve: Any) -> None:
        wanted = "Basic " + base64.b64encode(f"user:{CANARY}".encode()).decode()
        serve() if self.headers.get("Authorization") == wanted else self.send_error(401)

    def log_message(self, *args: Any) -> None:
        pass


def secrets(bench: Bench) -> None:
    """After the other scenarios: their jobs had the secrets in the environment, some crashed, some were killed."""
    with bench.row(SECRETS, "in the environment of every process of every job") as row:
        bench.reference()
        row.must(not bench.leaks, f"found in {bench.leaks[:5]}")
    folder = bench.folder / "url"
    (folder / "served").mkdir(parents=True)
    write_rows(folder / "served" / "rows.jsonl")
    with (
        bench.row(SECRETS, "a password in the data's URL") as row,
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(folder / "served"))) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        before = len(bench.leaks)
        url = f"http://user:{CANARY}@127.0.0.1:{server.server_port}/rows.jsonl"
        try:
            with bench.running(quick(folder, "url", data={"dataset_name": url}, stop_at_step=2), folder) as job:
                job.start()
                code = job.wait(120)
        finally:
            server.shutdown()
        row.notes.append(f"exit {code}: {job.said(200)}")
        row.must(code == 0, f"it exits with {code}: {job.said(300)}")
        row.must(len(bench.leaks) == before, f"found in {bench.leaks[before:][:5]}")
