"""A hub for tests: enough of its HTTP API that the real client makes a repository and uploads a folder into it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_tokenOfTheTestHub"


@dataclass
class Hub:
    """What arrived. `tokens` are the authorizations of all requests."""

    repositories: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # name → {"private": …, "files": {path: bytes}}
    tokens: set[str | None] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            known = name in self.repositories
            private = wanted.get("visibility") == "private"
            self.repositories.setdefault(name, {"private": private, "files": {}})
            return (409 if known else 200), {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.split("/")[3:5])
        if not path.startswith("/api/models/") or name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        if "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
        return 200, {"id": name, "private": repository["private"], "sha": "0" * 40, "siblings": [], "tags": []}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The server on this machine; requests without TOKEN are refused."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            hub.requests.append(f"{self.command} {self.path}")
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            path = self.path.partition("?")[0]
            status, answer = hub.answer(self.command, path, body) if allowed else (401, {"error": "Invalid token"})
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = handle_any  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
