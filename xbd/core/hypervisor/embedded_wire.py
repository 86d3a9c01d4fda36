"""What a guest and the embedded host say to each other; docs/embedded.md is the specification.

Every request is one packet of `REQUEST_SIZE` bytes and is answered by one of `REPLY_SIZE` bytes.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from pathlib import Path
from typing import Final

import attrs

from xbd.core.units import Domid, Port

SOCKET_NAME: Final = "hypervisor.socket"
MAGIC: Final = 0x48444258  # the bytes "XBDH"
VERSION: Final = 1
ASSIGN_DOMID: Final = 0xFFFFFFFF
FIRST_RESERVED_DOMID: Final = 0x7FF0  # DOMID_FIRST_RESERVED
BACKEND_DOMID: Final = Domid(0)
MAX_FDS: Final = 2

_REQUEST: Final = struct.Struct("<8I")
REQUEST_SIZE: Final = _REQUEST.size
_REPLY: Final = struct.Struct("<8I128s")
REPLY_SIZE: Final = _REPLY.size
_TEXT_SIZE: Final = 128
_REPLY_BIT: Final = 0x80000000

GRANT_ENTRY_SIZE: Final = 8
GRANT_PERMIT: Final = 1  # GTF_permit_access
GRANT_READONLY: Final = 4  # GTF_readonly


def socket_path(directory: Path) -> Path:
    """Where a guest finds the embedded host that lives in `directory`."""
    return directory / SOCKET_NAME


def grant_entry(to: Domid, *, readonly: bool) -> int:
    """A grant table entry, as a little-endian u64: u16 flags, u16 domid, u32 zero."""
    return (GRANT_PERMIT | (GRANT_READONLY if readonly else 0)) | to << 16


class WireError(Exception):
    """A message that breaks the protocol, or a request refused; `errno` and text go to the peer."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.errno = number
        self.text = text


class Kind(enum.IntEnum):
    """The first word of a request."""

    HELLO = 1
    OFFER = 2
    WITHDRAW = 3


@attrs.frozen
class Hello:
    """The first message: here is my memory and my grant table (two file descriptors)."""

    id: int
    domid: Domid | None
    """None: the host picks one."""
    pages: int

    def encode(self) -> bytes:
        domid = ASSIGN_DOMID if self.domid is None else self.domid
        return _REQUEST.pack(Kind.HELLO, self.id, MAGIC, VERSION, domid, self.pages, 0, 0)


@attrs.frozen
class Offer:
    """Here is a port: two eventfds, the one that wakes the backend first."""

    id: int
    port: Port
    remote: Domid
    """The only domain that may bind it."""

    def encode(self) -> bytes:
        return _REQUEST.pack(Kind.OFFER, self.id, self.port, self.remote, 0, 0, 0, 0)


@attrs.frozen
class Withdraw:
    """This port is no longer there."""

    id: int
    port: Port

    def encode(self) -> bytes:
        return _REQUEST.pack(Kind.WITHDRAW, self.id, self.port, 0, 0, 0, 0, 0)


Request = Hello | Offer | Withdraw


def request_id(packet: bytes) -> int:
    """The id to answer with, 0 if the packet is too short to have one."""
    return int.from_bytes(packet[4:8], "little") if len(packet) >= 8 else 0


def decode_request(packet: bytes) -> Request:
    """Parse what a guest sent; raises `WireError` (EPROTO, or EPROTONOSUPPORT for the version)."""
    if len(packet) != REQUEST_SIZE:
        raise WireError(
            errno.EPROTO, f"a message of {len(packet)} bytes, all have {REQUEST_SIZE} bytes"
        )
    kind, ident, first, second, third, fourth, *rest = _REQUEST.unpack(packet)
    match kind:
        case Kind.HELLO:
            return _decode_hello(ident, first, second, third, fourth, rest)
        case Kind.OFFER:
            _require_zero(third, fourth, *rest)
            return Offer(ident, Port(first), Domid(second))
        case Kind.WITHDRAW:
            _require_zero(second, third, fourth, *rest)
            return Withdraw(ident, Port(first))
    raise WireError(errno.EPROTO, f"unknown message type {kind}")


def _decode_hello(
    ident: int, magic: int, version: int, domid: int, pages: int, rest: list[int]
) -> Hello:
    if magic != MAGIC:
        raise WireError(errno.EPROTO, f"HELLO with magic {magic:#x}, not {MAGIC:#x}")
    if version != VERSION:
        raise WireError(
            errno.EPROTONOSUPPORT, f"protocol version {version}; this host speaks {VERSION}"
        )
    _require_zero(*rest)
    if domid == ASSIGN_DOMID:
        return Hello(ident, None, pages)
    if not 0 < domid < FIRST_RESERVED_DOMID:
        raise WireError(errno.EINVAL, f"domid {domid} is not in 1 to {FIRST_RESERVED_DOMID - 1}")
    return Hello(ident, Domid(domid), pages)


def _require_zero(*words: int) -> None:
    if any(words):
        raise WireError(errno.EPROTO, "unused words of a message must be zero")


@attrs.frozen
class Reply:
    """The host's answer to one request."""

    kind: int
    id: int
    errno: int = 0
    """0, or why the request was refused."""
    domid: Domid = BACKEND_DOMID
    """HELLO: who you are."""
    max_pages: int = 0
    """HELLO: the most pages of memory a guest may have here."""
    max_ports: int = 0
    """HELLO: the most ports you may offer at a time."""
    text: str = ""
    """For people: what is wrong."""

    def encode(self) -> bytes:
        text = self.text.encode()[: _TEXT_SIZE - 1].decode(errors="ignore").encode()
        numbers = (self.errno, self.domid, self.max_pages, self.max_ports, VERSION, 0)
        return _REPLY.pack(self.kind | _REPLY_BIT, self.id, *numbers, text)


def decode_reply(packet: bytes) -> Reply:
    """Parse the host's answer; raises `WireError` if it is none."""
    if len(packet) != REPLY_SIZE:
        raise WireError(errno.EPROTO, f"the host sent {len(packet)} bytes, not {REPLY_SIZE}")
    kind, ident, number, domid, max_pages, max_ports, _version, _zero, text = _REPLY.unpack(packet)
    if not kind & _REPLY_BIT:
        raise WireError(errno.EPROTO, f"the host sent type {kind:#x}, which is no reply")
    return Reply(
        kind & ~_REPLY_BIT,
        ident,
        number,
        Domid(domid),
        max_pages,
        max_ports,
        text.rstrip(b"\0").decode(errors="replace"),
    )


def refusal(packet: bytes, error: WireError) -> Reply:
    """The answer that tells a guest why its message was refused."""
    kind = int.from_bytes(packet[:4], "little") & ~_REPLY_BIT
    text = error.text or os.strerror(error.errno)
    return Reply(kind, request_id(packet), error.errno, text=text)
