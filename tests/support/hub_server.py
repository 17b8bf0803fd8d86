"""A model hub on this machine: what `huggingface_hub`'s own client needs to push and to fetch."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """files: what repositories hold, by (repository, path)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], bytes] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            self._json({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path.partition("?")[0]):
            for line in body.decode().splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    data = base64.b64decode(operation["value"]["content"])
                    self.server.files[match[1], operation["value"]["path"]] = data
            address = f"{self.server.endpoint}/{match[1]}/commit/{COMMIT}"
            self._json({"commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._send(404, b"{}")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
            data = self.server.files.get((match[1], match[2]))
            if data is None:
                self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                etag = f'"{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"'
                self._send(200, data, ETag=etag, X_Repo_Commit=COMMIT)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            names = [name for repository, name in self.server.files if repository == match[1]]
            siblings = [{"rfilename": name} for name in names]
            self._json({"id": match[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.+", path):
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for (repository, name), data in self.server.files.items()
                    if repository == match[1]
                ]
            )
        else:
            self._send(404, b"{}")

    do_HEAD = do_GET


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
