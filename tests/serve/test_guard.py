"""The limits around an application: who may ask, how much, and how many at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from qure_core.serve.guard import HEADERS, Guard, Message, Receive, Scope, Send
from qure_core.serve.options import Options


class Held:
    """An application that answers with what it was sent, once it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        content = b""
        while True:
            message: Message = await receive()
            content += message.get("body", b"")
            if not message.get("more_body"):
                break
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})
        self.running -= 1


def guarded(**options: Any) -> tuple[Held, httpx.AsyncClient]:
    app = Held()
    transport = httpx.ASGITransport(Guard(app, Options(index="x", **options)))
    return app, httpx.AsyncClient(transport=transport, base_url="http://localhost")


def test_so_many_wait_and_the_rest_is_told_when_to_come_again() -> None:
    async def main() -> None:
        app, client = guarded(waiting=3)
        tasks = [asyncio.create_task(client.get("/v1/index")) for _ in range(8)]
        while app.running < 3 or sum(task.done() for task in tasks) < 5:
            await asyncio.sleep(0.01)
        assert (await client.get("/v1/index")).status_code == 503
        app.go.set()
        answers = await asyncio.gather(*tasks)
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 5
        refused = [answer for answer in answers if answer.status_code == 503]
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert (await client.get("/v1/index")).status_code == 200  # room again

    asyncio.run(main())


def test_what_is_uncounted_answers_however_many_wait() -> None:
    async def main() -> None:
        app, client = guarded(waiting=1)
        held = asyncio.create_task(client.get("/v1/index"))
        while not app.running:
            await asyncio.sleep(0.01)
        alive = asyncio.create_task(client.get("/healthz"))
        app.go.set()
        assert (await alive).status_code == 200
        assert (await held).status_code == 200

    asyncio.run(main())


def test_an_answer_that_takes_too_long() -> None:
    async def main() -> None:
        _, client = guarded(seconds=0.05)
        answer = await client.get("/v1/index")
        assert (answer.status_code, answer.json()["detail"]) == (504, "no answer in 0.05 s")

    asyncio.run(main())


def test_how_much_a_request_may_send() -> None:
    async def main() -> None:
        app, client = guarded(upload_mb=1)
        app.go.set()
        assert len((await client.post("/v1/search", content=b"x" * 2**20)).content) == 2**20

        async def parts() -> Any:
            for _ in range(2**10 + 1):
                yield b"x" * 2**10

        answer = await client.post("/v1/search", content=parts())  # its length is not told before
        assert (answer.status_code, answer.json()["detail"]) == (413, "a request may send 1 MB")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic right-token"}, 401),
        ({"authorization": "Bearer right-token"}, 200),
        ({"authorization": "bearer right-token"}, 200),
        ({"cookie": "qure-token=right-token"}, 200),
        ({"cookie": "qure-token=wrong; other=right-token"}, 401),
        ({"cookie": "qure-token=right\x7f"}, 401),
        ({"authorization": "Bearer r\u00efght"}, 401),
    ],
)
def test_who_may_ask(headers: dict[str, str], status: int) -> None:
    async def main() -> None:
        app, client = guarded(token="right-token")
        app.go.set()
        raw = [(name, value.encode("latin-1")) for name, value in headers.items()]
        answer = await client.get("/v1/index", headers=raw)
        assert answer.status_code == status
        assert (await client.get("/")).status_code == 200  # the page itself tells nothing
        assert dict(answer.headers).items() >= HEADERS.items()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("", 421),
    ],
)
def test_by_which_name_it_is_called(host: str, status: int) -> None:
    async def main() -> None:
        app, client = guarded(hosts=("localhost", "127.0.0.1", "[::1]"))
        app.go.set()
        assert (await client.get("/v1/index", headers={"host": host})).status_code == status

    asyncio.run(main())
