"""A small Hugging Face Hub on localhost: enough of its HTTP interface for look-ups and downloads by the real client.

``python tests/hub_server.py FOLDER`` serves ``FOLDER/<org>/<name>/`` as repositories and prints its port.
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """``/api/models/...`` for look-ups, ``/<repo>/resolve/<revision>/<file>`` for files."""

    root: Path

    def do_GET(self) -> None:
        """Answer with a body."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        org, name, *rest = parts[2:] if api else parts
        repo = self.root / org / name
        revision = rest[1] if len(rest) > 1 else "main"
        if not repo.is_dir():
            self._refuse(404, "RepoNotFound")
        elif (repo / ".gated").exists():
            self._refuse(403, "GatedRepo")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif not api:
            self._send((repo / "/".join(rest[2:])).read_bytes(), body)
        elif rest[:1] == ["tree"]:
            self._send(
                json.dumps(
                    [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": self._oid(p)} for p in self._files(repo)]
                ).encode(),
                body,
            )
        else:
            siblings = [{"rfilename": p.name} for p in self._files(repo)]
            self._send(
                json.dumps(
                    {"id": f"{org}/{name}", "modelId": f"{org}/{name}", "sha": COMMIT, "siblings": siblings, "private": False}
                ).encode(),
                body,
            )

    @staticmethod
    def _files(repo: Path) -> list[Path]:
        return sorted(p for p in repo.iterdir() if p.is_file())

    @staticmethod
    def _oid(path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def _send(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
