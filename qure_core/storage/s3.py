"""S3 through s3fs: patience with a store that is away, slow or overloaded, and no stale listings.

Credentials, endpoint and region come from where AWS's own tools take them: the environment
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...), the files of ``~/.aws``, or the machine's role.
"""

from __future__ import annotations

import threading
import time
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

ATTEMPTS = 14
"""Tries of one request. s3fs waits 0.1 s, 1.7 times longer each time up to 15 s: 90 s in all."""
_SAY_EVERY = 10.0  # seconds between messages about a store that does not answer
_SKEW = ("RequestTimeTooSkewed", "RequestExpired")
_SKEW_SECONDS = 900  # S3's limit
_ABSENT = ("404", "NoSuchKey")
_BUSY = ("RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException")


class _Waiting:
    """Says that requests wait for the store, once in a while and from whichever thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.said = -_SAY_EVERY

    def __call__(self, error: Exception) -> None:
        with self.lock:
            now = time.monotonic()
            if now - self.said >= _SAY_EVERY:
                self.said = now
                print(f"[storage] waiting, the store does not answer well: {error}", flush=True)


_waiting = _Waiting()


def is_transient(error: Exception) -> bool:
    """Whether asking again may help: the store is unreachable, overloaded or has failed."""
    from botocore.exceptions import ClientError, ConnectionError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        transient = status >= 500 or status == 429 or code in _BUSY
    else:
        transient = isinstance(error, ConnectionError)  # botocore's: no connection was made
    if transient:
        _waiting(error)
    return transient


@cache
def _set_handler() -> None:
    import s3fs.core

    s3fs.core.set_custom_error_handler(is_transient)


def options() -> dict[str, Any]:
    """What an `s3fs.S3FileSystem` is made with."""
    _set_handler()
    return {
        "use_listings_cache": False,  # other processes write: a kept listing would hide it
        # Few tries within a request: s3fs asks again, and says so.
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 2},
        },
    }


def arrow_filesystem() -> S3FileSystem:
    """Arrow's own client of the same store, as patient as the other.

    Arrow does not read the endpoint of ``~/.aws/config``, so it is told; the credentials it takes
    from the same places itself, on every node that gets this object.
    """
    from botocore.session import get_session

    facts = get_session().create_client("s3").meta
    own = urlsplit(facts.endpoint_url)
    other = None if own.netloc.endswith("amazonaws.com") else own.netloc
    return S3FileSystem(
        region=facts.region_name,
        scheme=own.scheme,
        endpoint_override=other,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def _is_skewed(response: Any) -> bool:
    """Whether a request was refused because this node's clock is wrong."""
    if response.get("Error", {}).get("Code") in _SKEW:
        return True
    # A refused HEAD has no text that says why.
    facts = response.get("ResponseMetadata", {})
    date = facts.get("HTTPHeaders", {}).get("date")
    if facts.get("HTTPStatusCode") != 403 or not date:
        return False
    return abs(parsedate_to_datetime(date).timestamp() - time.time()) > _SKEW_SECONDS


def describe(error: BaseException) -> str | None:
    """A store's error in words that say what to do; None if it is not one."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    if isinstance(error, NoCredentialsError):
        return (
            "no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
            "AWS_ENDPOINT_URL for a store that is not Amazon's) on every node, or use ~/.aws"
        )
    if isinstance(error, ClientError) and _is_skewed(error.response):
        return f"{error}; set this node's clock (S3 refuses one that is 15 minutes off)"
    if isinstance(error, ClientError) and error.response.get("Error", {}).get("Code") in _ABSENT:
        return None  # of an object, not of the store
    return str(error) if isinstance(error, (BotoCoreError, ClientError)) else None
