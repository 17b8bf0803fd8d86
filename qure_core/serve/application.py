"""The service's Ray Serve application: encoders, shares of the index, and the ingress."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from qure_core.serve.ingress import Served, make_app
from qure_core.serve.options import Options, Version, checked_token
from qure_core.serve.replicas import Asked, Encoded, Encoders, Shares, Wanted

_AT_ONCE = 64  # calls that a replica takes on


@dataclass(frozen=True)
class Sizes:
    """How many processes, and what each is given."""

    encoders: int = 1
    shares: int = 1
    ingresses: int = 1
    cpus: int = 1
    gpus: float = 0


class _Replicas:
    """`Backend` over Ray Serve's handles."""

    def __init__(self, encoders: Any, shares: Sequence[Any]) -> None:
        self._encoders, self._shares = encoders, shares

    async def embed(self, asked: Asked) -> Encoded:
        encoded: Encoded = await self._encoders.embed.remote(asked)
        return encoded

    async def search(
        self, version: Version, query: np.ndarray, wanted: Wanted
    ) -> tuple[np.ndarray, float]:
        found = await asyncio.gather(
            *(share.search.remote(version, query, wanted) for share in self._shares)
        )
        keys = np.sort(np.concatenate([own for own, _ in found]))[: wanted.top]
        return keys, max(seconds for _, seconds in found)

    async def tokens(self, version: Version, query: np.ndarray, places: Sequence[int]) -> list[int]:
        tokens: list[int] = await self._shares[0].tokens.remote(version, query, places)
        return tokens

    async def attention(self, version: Version, uri: str, token: int) -> dict[str, Any] | str:
        found: dict[str, Any] | str = await self._encoders.attention.remote(version, uri, token)
        return found

    async def ready(self, version: Version) -> None:
        everyone = (self._encoders, *self._shares)
        await asyncio.gather(*(each.ready.remote(version) for each in everyone))


@serve.ingress()
class Ingress:
    """Replica of the ingress: the routes, and the handles behind them."""

    def __init__(
        self, options: Options, encoders: DeploymentHandle[Any], *shares: DeploymentHandle[Any]
    ) -> None:
        self._options, self._replicas = options, _Replicas(encoders, shares)

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self._options, self._replicas).app


class Arguments(BaseModel, extra="forbid"):
    """What a Serve config gives: of `Options` and `Sizes` what differs between services."""

    index: str
    checkpoint: str | None = None
    encoders: int = Field(1, ge=1)
    shares: int = Field(1, ge=1)
    ingresses: int = Field(1, ge=1)
    cpus: int = Field(1, ge=1)
    gpus: float = Field(0, ge=0)
    waiting: int = Field(64, ge=1)


def built(arguments: Arguments) -> Any:
    """The application of a Serve config (`qure_core.serve.application:built`), as KubeRay runs it.

    ``QURE_TOKEN`` in the environment is the token that whoever asks has to send.
    """
    token = os.environ.get("QURE_TOKEN")
    options = Options(
        index=arguments.index,
        checkpoint=arguments.checkpoint,
        token=checked_token(token, "QURE_TOKEN") if token else None,
        waiting=arguments.waiting,
    )
    given = arguments.model_dump(include={"encoders", "shares", "ingresses", "cpus", "gpus"})
    return application(options, Sizes(**given))


def _deployed(replica: type, **options: Any) -> Any:
    return serve.deployment(**options)(replica)


def _replicas(options: Options, sizes: Sizes) -> tuple[Any, list[Any]]:
    """The encoders' application, and that of each share of the index."""
    actor = {"num_cpus": sizes.cpus}
    encoders = _deployed(
        Encoders,
        name="encoders",
        num_replicas=sizes.encoders,
        max_ongoing_requests=_AT_ONCE,
        ray_actor_options=actor | {"num_gpus": sizes.gpus},
    ).bind(options, sizes.cpus)
    shares = [
        _deployed(
            Shares,
            name=f"index-{number}",
            max_ongoing_requests=_AT_ONCE,
            ray_actor_options=actor,
        ).bind(options, (number, sizes.shares), sizes.cpus)
        for number in range(sizes.shares)
    ]
    return encoders, shares


def application(options: Options, sizes: Sizes) -> Any:
    """The application whose ingress Ray Serve's proxies call, on every node of a cluster."""
    encoders, shares = _replicas(options, sizes)
    ingress = _deployed(
        Ingress,
        name="ingress",
        num_replicas=sizes.ingresses,
        # The ingress refuses by itself what is too many; it has to be reached for that.
        max_ongoing_requests=options.waiting + 1000,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(options, encoders, *shares)


@contextmanager
def started(options: Options, sizes: Sizes) -> Iterator[Served]:
    """Start the replicas, and give an ingress for this very process: two hops fewer a request.

    At the end the replicas are stopped, and nothing else that the cluster may serve.
    """
    serve.start(proxy_location="Disabled")
    own = f"search-{uuid.uuid4().hex[:8]}"
    encoders, shares = _replicas(options, sizes)
    names, handles = [], []
    try:
        for number, each in enumerate((encoders, *shares)):
            names.append(f"{own}-{number}")
            quiet = {"enable_access_log": False}
            handles.append(serve.run(each, name=names[-1], route_prefix=None, logging_config=quiet))
        yield make_app(options, _Replicas(handles[0], handles[1:]))
    finally:
        for name in names:
            serve.delete(name)
