"""What the errors of a disk or an object store say: of the storage, or of one file."""

from __future__ import annotations

import errno

from qure_core.base.errors import chain
from qure_core.storage import s3 as object_storage

# What a disk says that is full or forbidden, or that fails, as those of s3fs do whose cause was
# lost on the way from another node.
_DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_DISK_FAILS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.EBUSY, errno.EREMOTEIO),
}


def fault(error: BaseException) -> str | None:
    """What a storage's error, or the one that Ray brought from a node, says; None if not one."""
    links = list(chain(error))
    # What the store itself said tells more than what s3fs made of it.
    for link in links:
        if text := object_storage.describe(link):
            return text
    for link in links:
        if isinstance(link, OSError) and (is_refused(link) or _fails(link)):
            return f"{link.strerror}: {link.filename}" if link.filename else str(link)
    return None


def is_refused(error: BaseException) -> bool:
    """Whether a storage is full or does not let this be written or read."""
    # s3fs's PermissionError has no number.
    return isinstance(error, PermissionError) or (
        isinstance(error, OSError) and error.errno in _DISK_REFUSES
    )


def _fails(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_FAILS


def is_away(error: BaseException) -> bool:
    """Whether the storage, not one of its files, is what failed."""
    return any(object_storage.describe(link) or _fails(link) for link in chain(error))
