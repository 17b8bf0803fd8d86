"""An S3 endpoint with bad days: a proxy that answers 503, is slow, or is not there at all."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
    "<Message>This is {code}.</Message></Error>"
)
_BUSY = _ERROR.format(code="ServiceUnavailable").encode()
DENIED = 403, _ERROR.format(code="AccessDenied").encode()
# What a store says that was asked to delete many objects and has not.
NOT_DELETED = (
    200,
    (
        b'<?xml version="1.0" encoding="UTF-8"?><DeleteResult><Error><Key>x</Key>'
        b"<Code>AccessDenied</Code><Message>Access Denied</Message></Error></DeleteResult>"
    ),
)
_OWN = {"connection", "transfer-encoding", "keep-alive"}  # headers of one connection alone


class FlakyStorage:
    """Forwards to ``target``; what goes wrong is set from outside.

    ``fail_every`` n answers every n-th request with 503, ``delay`` waits so many seconds with
    each, `away` and `back` close and open the port. ``answers`` has status and body by what
    "METHOD PATH" begins with; one request that begins with ``lose`` is carried out and its answer
    lost. ``failed`` and ``dropped`` count.
    """

    def __init__(self, target: str, host: str = "127.0.0.1") -> None:
        self.target = urlsplit(target).netloc
        self.host, self.port = host, 0
        self.fail_every = 0
        self.delay = 0.0
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.lose = ""
        self.requests = self.failed = self.dropped = 0
        self._lock = threading.Lock()
        self._open: set[BaseHTTPRequestHandler] = set()
        self.back()

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def back(self) -> None:
        self._server = ThreadingHTTPServer((self.host, self.port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def away(self) -> None:
        """Stop listening and cut every connection."""
        self._server.shutdown()
        self._server.server_close()
        for handler in list(self._open):
            self.dropped += 1
            with suppress(OSError):
                handler.connection.shutdown(2)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        storage = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else small answers wait for an acknowledgement
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                storage._open.add(self)

            def finish(self) -> None:
                storage._open.discard(self)
                with suppress(OSError):
                    super().finish()

            def log_message(self, *_: object) -> None: ...

            def answer(self) -> None:
                body = self._body()
                with storage._lock:
                    storage.requests += 1
                    turn = storage.fail_every and storage.requests % storage.fail_every == 0
                    storage.failed += bool(turn)
                if storage.delay:
                    time.sleep(storage.delay)
                if turn:
                    self._send(503, [("Content-Type", "application/xml")], _BUSY)
                    return
                line = f"{self.command} {self.path}"
                for begin, (status, text) in storage.answers.items():
                    if line.startswith(begin):
                        self._send(status, [("Content-Type", "application/xml")], text)
                        return
                if storage.lose and line.startswith(storage.lose):
                    storage.lose = ""
                    storage.dropped += 1
                    self._forward(body, lost=True)
                    return
                self._forward(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _forward(self, body: bytes, *, lost: bool = False) -> None:
                onward = http.client.HTTPConnection(storage.target, timeout=120)
                try:
                    onward.putrequest(
                        self.command, self.path, skip_host=True, skip_accept_encoding=True
                    )
                    for name, value in self.headers.items():
                        if name.lower() not in {*_OWN, "content-length", "expect"}:
                            onward.putheader(name, value)
                    onward.putheader("Content-Length", str(len(body)))
                    onward.endheaders(body)
                    reply = onward.getresponse()
                    data = reply.read()
                    if lost:
                        self.close_connection = True
                        self.connection.shutdown(2)
                        return
                    self._send(reply.status, reply.getheaders(), data)
                finally:
                    onward.close()

            def _send(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
                self.send_response_only(status)
                length = str(len(data))
                for name, value in headers:
                    if name.lower() == "content-length" and self.command == "HEAD":
                        length = value  # of what a GET would have
                    elif name.lower() not in {*_OWN, "content-length"}:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                with suppress(OSError):  # the client may be gone
                    self.end_headers()
                    self.wfile.write(data)

        return Handler


@contextmanager
def flaky_storage(target: str, host: str = "127.0.0.1") -> Iterator[FlakyStorage]:
    storage = FlakyStorage(target, host)
    try:
        yield storage
    finally:
        storage.away()
