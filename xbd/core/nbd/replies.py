"""Replies of the transmission phase as bytes.

NBD protocol document, sections "Simple reply message" and "Structured reply chunk message".
Data follows what is made here.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from typing import Final

from xbd.core.driver import BlockStatus
from xbd.core.errors import DriverError
from xbd.core.nbd import constants as nbd
from xbd.core.nbd.negotiation import CONTEXT_ID

SIMPLE: Final = struct.Struct(">IIQ")
"""Magic, error, cookie."""

_CHUNK: Final = struct.Struct(">IHHQI")
_DATA: Final = struct.Struct(">IHHQIQ")
_HOLE: Final = struct.Struct(">IHHQIQI")
_ERROR: Final = struct.Struct(">IHHQIIH")
_DESCRIPTOR: Final = struct.Struct(">II")

_DATA_PAYLOAD: Final = 8
_HOLE_PAYLOAD: Final = 12
_ERROR_PAYLOAD: Final = 6

_BY_ERRNO: Final = {
    errno.EPERM: nbd.EPERM,
    errno.EACCES: nbd.EPERM,
    errno.EROFS: nbd.EPERM,
    errno.ENOMEM: nbd.ENOMEM,
    errno.EINVAL: nbd.EINVAL,
    errno.EOPNOTSUPP: nbd.EINVAL,
    errno.ENOSPC: nbd.ENOSPC,
    errno.EDQUOT: nbd.ENOSPC,
    errno.EFBIG: nbd.ENOSPC,
}


def error_of(error: DriverError) -> tuple[int, bytes]:
    """The protocol's error value, and a text for people that names nothing of the host."""
    return _BY_ERRNO.get(error.errno, nbd.EIO), os.strerror(error.errno).encode()


def done(cookie: int) -> bytes:
    """Success without data; allowed for everything but a read with structured replies."""
    return SIMPLE.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie)


def nothing(cookie: int) -> bytes:
    """The end of a structured reply."""
    return _CHUNK.pack(
        nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE, nbd.REPLY_TYPE_NONE, cookie, 0
    )


def data(cookie: int, offset: int, length: int, *, last: bool = True) -> bytes:
    """The beginning of a chunk with `length` bytes of data."""
    return _DATA.pack(
        nbd.STRUCTURED_REPLY_MAGIC,
        nbd.REPLY_FLAG_DONE if last else 0,
        nbd.REPLY_TYPE_OFFSET_DATA,
        cookie,
        _DATA_PAYLOAD + length,
        offset,
    )


def hole(cookie: int, offset: int, length: int, *, last: bool = True) -> bytes:
    """A chunk that says that a range reads as zeroes."""
    return _HOLE.pack(
        nbd.STRUCTURED_REPLY_MAGIC,
        nbd.REPLY_FLAG_DONE if last else 0,
        nbd.REPLY_TYPE_OFFSET_HOLE,
        cookie,
        _HOLE_PAYLOAD,
        offset,
        length,
    )


def failed(cookie: int, error: int, text: bytes, *, structured: bool) -> bytes:
    """A request's failure."""
    if not structured:
        return SIMPLE.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)
    return (
        _ERROR.pack(
            nbd.STRUCTURED_REPLY_MAGIC,
            nbd.REPLY_FLAG_DONE,
            nbd.REPLY_TYPE_ERROR,
            cookie,
            _ERROR_PAYLOAD + len(text),
            error,
            len(text),
        )
        + text
    )


def block_status(cookie: int, told: Sequence[BlockStatus]) -> bytes:
    """The answer for ``base:allocation``."""
    descriptors = b"".join(
        _DESCRIPTOR.pack(
            status.length,
            (nbd.STATE_HOLE if status.hole else 0) | (nbd.STATE_ZERO if status.zero else 0),
        )
        for status in told
    )
    header = _CHUNK.pack(
        nbd.STRUCTURED_REPLY_MAGIC,
        nbd.REPLY_FLAG_DONE,
        nbd.REPLY_TYPE_BLOCK_STATUS,
        cookie,
        4 + len(descriptors),
    )
    return header + CONTEXT_ID.to_bytes(4, "big") + descriptors
