"""XenStore's wire format: xen/include/public/io/xs_wire.h and docs/misc/xenstore.txt.

A packet is a header of four native 32-bit words (operation, request id, transaction id, payload
length) and a payload of at most 4096 bytes.  The packets and operations are pyxs's; what they
lack (`DIRECTORY_PART`, `RESET_WATCHES`, packets out of a stream in pieces) is here.  Pure: no I/O.
"""

from __future__ import annotations

import errno as errno_module
from collections.abc import Iterator
from typing import Final, Protocol, cast

from pyxs._internal import NUL as _PYXS_NUL
from pyxs._internal import Op
from pyxs._internal import Packet as _PyxsPacket

from xbd.core.errors import StoreError

__all__ = [
    "ABSOLUTE_PATH_MAX",
    "DIRECTORY_PART",
    "HEADER_SIZE",
    "NUL",
    "PAYLOAD_MAX",
    "RELATIVE_PATH_MAX",
    "RESET_WATCHES",
    "RESULT_OK",
    "Op",
    "Packet",
    "PacketStream",
    "WireError",
    "encode",
    "errno_name",
    "errno_of",
    "operation_name",
    "packet",
    "strings",
]

NUL: Final[bytes] = _PYXS_NUL
RESET_WATCHES: Final = 21
DIRECTORY_PART: Final = 22

PAYLOAD_MAX: Final = 4096
"""Bytes; a longer payload costs the sender its connection."""
ABSOLUTE_PATH_MAX: Final = 3072
RELATIVE_PATH_MAX: Final = 2048
HEADER_SIZE: Final = int(_PyxsPacket._struct.size)
RESULT_OK: Final = b"OK\x00"


class Packet(Protocol):
    """What is used of pyxs's named tuple, which has no types."""

    @property
    def op(self) -> int: ...
    @property
    def rq_id(self) -> int: ...
    @property
    def tx_id(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def payload(self) -> bytes: ...


_ERRORS: Final = (
    *("EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO", "ENOTEMPTY"),
    *("ENOSYS", "EROFS", "EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM"),
)
_ERRNO_OF: Final[dict[bytes, int]] = {
    name.encode(): getattr(errno_module, name) for name in _ERRORS
} | {b"EQUOTA": errno_module.EDQUOT}
_NAME_OF: Final = {number: name for name, number in _ERRNO_OF.items()}
_OPERATIONS: Final[dict[int, str]] = {number: name for name, number in Op._asdict().items()} | {
    RESET_WATCHES: "RESET_WATCHES",
    DIRECTORY_PART: "DIRECTORY_PART",
}


class WireError(Exception):
    """The other side sent what is not XenStore's protocol; the connection is of no further use."""


def packet(op: int, payload: bytes, req_id: int, tx_id: int = 0) -> Packet:
    """A packet, also with an operation that pyxs does not know."""
    if len(payload) > PAYLOAD_MAX:
        raise StoreError(
            f"XenStore takes {PAYLOAD_MAX} bytes in one request, not {len(payload)}",
            errno=errno_module.E2BIG,
        )
    return cast("Packet", _PyxsPacket._make((op, req_id, tx_id, len(payload), payload)))


def encode(message: Packet) -> bytes:
    """The packet as it goes over the wire."""
    header: bytes = _PyxsPacket._struct.pack(message.op, message.rq_id, message.tx_id, message.size)
    return header + bytes(message.payload)


class PacketStream:
    """Cuts a byte stream into packets; keeps at most one incomplete packet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Packet]:
        """All packets complete by now.  Raises `WireError` at the first that can't be one."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= HEADER_SIZE:
                op, req_id, tx_id, size = _PyxsPacket._struct.unpack_from(buffer, start)
                if size > PAYLOAD_MAX:
                    raise WireError(f"a payload of {size} bytes, over {PAYLOAD_MAX}")
                end = start + HEADER_SIZE + size
                if len(buffer) < end:
                    break
                payload = bytes(buffer[start + HEADER_SIZE : end])
                start = end
                yield cast("Packet", _PyxsPacket._make((op, req_id, tx_id, size, payload)))
        finally:
            del buffer[:start]


def strings(payload: bytes) -> list[bytes]:
    """The payload's NUL-terminated strings; a rest without NUL is the last one."""
    parts = payload.split(NUL)
    if parts[-1] == b"":
        parts.pop()
    return parts


def errno_of(payload: bytes) -> int:
    """The errno that an ERROR reply names; EIO for a name that is not XenStore's."""
    return _ERRNO_OF.get(payload.rstrip(NUL), errno_module.EIO)


def errno_name(number: int) -> bytes:
    """How an ERROR reply names this errno; EINVAL for one that XenStore has no name for."""
    return _NAME_OF.get(number, b"EINVAL")


def operation_name(op: int) -> str:
    """For messages."""
    return _OPERATIONS.get(op, f"operation {op}")
