"""What keeps a service within its limits, before a request reaches it: pure ASGI.

Who may ask, by which name, how much a request may send, how many may wait, and what headers every
answer has.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from qure_core.serve.options import Options

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "qure-token"
OPEN = ("/", "/page.js", "/page.css", "/icon.svg", "/healthz", "/readyz")
"""Paths that need no token: they tell nothing of the corpus."""
UNCOUNTED = (*OPEN, "/metrics")
"""Paths that are answered however many requests wait."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class _TooMuch(Exception):
    """A request sent more than it may."""


class _Body:
    """What a request sends, until it is too much."""

    def __init__(self, receive: Receive, left: int) -> None:
        self._receive, self._left, self.too_much = receive, left, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.too_much = True
            raise _TooMuch
        return message


class Guard:
    """An application within the limits of ``options``."""

    def __init__(self, app: App, options: Options) -> None:
        self.app, self.options = app, options
        self.waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        begun = False
        body = _Body(receive, self.options.upload_mb * 2**20)

        async def answer(message: Message) -> None:
            nonlocal begun
            if body.too_much and not begun:
                raise _TooMuch  # whatever was made of a body that was cut off
            if message["type"] == "http.response.start":
                begun = True
                own = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in HEADERS.items()
                        if name.encode() not in own
                    ),
                ]
            await send(message)

        async def refuse(status: int, detail: str, **more: str) -> None:
            body = json.dumps({"detail": detail}).encode()
            facts = {"content-type": "application/json", "content-length": str(len(body))} | more
            pairs = [(name.replace("_", "-").encode(), v.encode()) for name, v in facts.items()]
            await answer({"type": "http.response.start", "status": status, "headers": pairs})
            await answer({"type": "http.response.body", "body": body})

        path = scope["path"]
        if not self._is_called_rightly(headers.get("host", "")):
            await refuse(421, "this service is not known by that name")
        elif path not in OPEN and not self._may_ask(headers):
            await refuse(401, "this service asks for a token", www_authenticate="Bearer")
        elif path in UNCOUNTED:
            await self.app(scope, receive, answer)
        elif self.waiting >= self.options.waiting:
            await refuse(503, "too many requests wait; try again in a second", retry_after="1")
        else:
            self.waiting += 1
            try:
                async with asyncio.timeout(self.options.seconds):
                    await self.app(scope, body, answer)
            except _TooMuch:
                body.too_much = False
                if not begun:
                    await refuse(413, f"a request may send {self.options.upload_mb} MB")
            except TimeoutError:
                if not begun:
                    await refuse(504, f"no answer in {self.options.seconds:g} s")
            finally:
                self.waiting -= 1

    def _is_called_rightly(self, host: str) -> bool:
        """A page elsewhere that has its own name resolve to this machine calls by that name."""
        if self.options.hosts is None:
            return True
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return name.lower() in self.options.hosts

    def _may_ask(self, headers: dict[str, str]) -> bool:
        token = self.options.token
        if token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            try:
                cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            except CookieError:
                cookie = None
            given = cookie.value if cookie else ""
        return hmac.compare_digest(given.encode(), token.encode())
