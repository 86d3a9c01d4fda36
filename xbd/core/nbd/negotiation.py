"""The handshake: fixed newstyle negotiation, without any I/O.

NBD protocol document, sections "Handshake" and "Option types".  `receive` what the client sends,
send what `next_reply` gives until it gives None, look at `agreed` and `over`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import attrs

from xbd.core.nbd import constants as nbd
from xbd.core.nbd.errors import BadClient
from xbd.core.nbd.export import Export

MAX_OPTION: Final = 64 << 10
"""Bytes of an option's data; honest ones have some hundreds."""

_OPTION: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_EXPORT: Final = struct.Struct(">QH")
_RESERVED: Final = bytes(124)
_KNOWN_FLAGS: Final = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES


@attrs.frozen
class Agreed:
    """What holds for the transmission phase."""

    structured: bool
    """Whether replies are."""
    allocation: bool
    """Whether the client may ask for ``base:allocation``."""
    flags: nbd.TransmissionFlag
    """What it was offered."""


class Negotiation:
    """One client's handshake."""

    greeting: Final = struct.pack(">QQH", nbd.NBDMAGIC, nbd.IHAVEOPT, _KNOWN_FLAGS)
    """To be sent first."""

    def __init__(self, export: Export) -> None:
        self.agreed: Agreed | None = None
        """Set when the transmission phase has begun."""
        self.over = False
        """The client wants no more."""
        self._export = export
        self._received = bytearray()
        self._client_flags: int | None = None
        self._structured = False
        self._meta_name: bytes | None = None
        """The export whose ``base:allocation`` was selected."""
        self._data = b""

    def receive(self, data: bytes) -> None:
        """What came from the client."""
        self._received += data

    @property
    def rest(self) -> bytes:
        """Received and not used: the beginning of the transmission phase."""
        return bytes(self._received)

    def next_reply(self) -> bytes | None:
        """Go on by one step; None if more must be received, or everything is said.

        Raises `BadClient`.
        """
        if self.agreed is not None or self.over:
            return None
        if self._client_flags is None:
            return self._take_client_flags()
        if len(self._received) < _OPTION.size:
            return None
        magic, option, length = _OPTION.unpack_from(self._received)
        if magic != nbd.IHAVEOPT:
            raise BadClient("an option has the wrong magic number")
        if length > MAX_OPTION:
            raise BadClient(f"option {option} has {length} bytes of data")
        end = _OPTION.size + length
        if len(self._received) < end:
            return None
        self._data = bytes(self._received[_OPTION.size : end])
        del self._received[:end]
        return self._answer(option)

    def _take_client_flags(self) -> bytes | None:
        if len(self._received) < _U32.size:
            return None
        (flags,) = _U32.unpack_from(self._received)
        del self._received[: _U32.size]
        if flags & ~_KNOWN_FLAGS:
            raise BadClient(f"unknown client flags {flags:#x}")
        self._client_flags = flags
        return b""

    def _answer(self, option: int) -> bytes:
        match option:
            case nbd.OPT_EXPORT_NAME:
                return self._export_name()
            case nbd.OPT_ABORT:
                self.over = True
                return _reply(option, nbd.REP_ACK)
            case nbd.OPT_LIST:
                return self._list()
            case nbd.OPT_INFO | nbd.OPT_GO:
                return self._info(option)
            case nbd.OPT_STRUCTURED_REPLY:
                return self._structured_reply()
            case nbd.OPT_LIST_META_CONTEXT | nbd.OPT_SET_META_CONTEXT:
                return self._meta_context(option)
            case nbd.OPT_STARTTLS:
                text = b"a UNIX socket needs no TLS"
                return _reply(option, nbd.REP_ERR_POLICY, text)
            case _:
                return _reply(option, nbd.REP_ERR_UNSUP, b"unknown option")

    # -- options ----------------------------------------------------------------------------

    def _export_name(self) -> bytes:
        """The one option without error replies: who asks for what is not there is cut off."""
        if not self._export.is_called(self._data):
            raise BadClient("asked for an export that is not here")
        agreed = self._begin(self._data)
        reply = _EXPORT.pack(self._export.size, agreed.flags)
        assert self._client_flags is not None
        return reply if self._client_flags & nbd.FLAG_NO_ZEROES else reply + _RESERVED

    def _begin(self, name: bytes) -> Agreed:
        self.agreed = Agreed(self._structured, self._meta_name == name, self._flags())
        return self.agreed

    def _flags(self) -> nbd.TransmissionFlag:
        return self._export.flags(structured=self._structured)

    def _list(self) -> bytes:
        if self._data:
            return _reply(nbd.OPT_LIST, nbd.REP_ERR_INVALID, b"the option takes no data")
        name = self._export.name.encode()
        server = _U32.pack(len(name)) + name + self._export.description.encode()
        return _reply(nbd.OPT_LIST, nbd.REP_SERVER, server) + _reply(nbd.OPT_LIST, nbd.REP_ACK)

    def _info(self, option: int) -> bytes:
        try:
            name, asked = _parse_info(self._data)
        except struct.error:
            return _reply(option, nbd.REP_ERR_INVALID, b"malformed request for an export")
        export = self._export
        if not export.is_called(name):
            return _reply(option, nbd.REP_ERR_UNKNOWN, b"no export of this name")
        infos = [_U16.pack(nbd.INFO_EXPORT) + _EXPORT.pack(export.size, self._flags())]
        if nbd.INFO_NAME in asked:
            infos.append(_U16.pack(nbd.INFO_NAME) + export.name.encode())
        if nbd.INFO_DESCRIPTION in asked and export.description:
            infos.append(_U16.pack(nbd.INFO_DESCRIPTION) + export.description.encode())
        if nbd.INFO_BLOCK_SIZE in asked:
            sizes = struct.pack(">III", *export.block_sizes(), nbd.MAX_PAYLOAD)
            infos.append(_U16.pack(nbd.INFO_BLOCK_SIZE) + sizes)
        if option == nbd.OPT_GO:
            self._begin(name)
        replies = [_reply(option, nbd.REP_INFO, info) for info in infos]
        return b"".join(replies) + _reply(option, nbd.REP_ACK)

    def _structured_reply(self) -> bytes:
        option = nbd.OPT_STRUCTURED_REPLY
        if self._data:
            return _reply(option, nbd.REP_ERR_INVALID, b"the option takes no data")
        self._structured = True
        return _reply(option, nbd.REP_ACK)

    def _meta_context(self, option: int) -> bytes:
        setting = option == nbd.OPT_SET_META_CONTEXT
        if setting:
            self._meta_name = None
        try:
            name, queries = _parse_queries(self._data)
        except struct.error:
            return _reply(option, nbd.REP_ERR_INVALID, b"malformed query of metadata contexts")
        if setting and not self._structured:
            return _reply(option, nbd.REP_ERR_INVALID, b"needs structured replies")
        if not self._export.is_called(name):
            return _reply(option, nbd.REP_ERR_UNKNOWN, b"no export of this name")
        if setting:
            found = nbd.BASE_ALLOCATION in queries
            if found:
                self._meta_name = name
        else:
            found = not queries or bool({b"base:", nbd.BASE_ALLOCATION} & set(queries))
        context = b""
        if found:
            described = _U32.pack(CONTEXT_ID if setting else 0) + nbd.BASE_ALLOCATION
            context = _reply(option, nbd.REP_META_CONTEXT, described)
        return context + _reply(option, nbd.REP_ACK)


CONTEXT_ID: Final = 1
"""What ``base:allocation`` is called in replies."""


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return _REPLY.pack(nbd.REPLY_MAGIC, option, kind, len(data)) + data


def _parse_info(data: bytes) -> tuple[bytes, Sequence[int]]:
    """The export's name and the kinds of information asked for; struct.error if malformed."""
    name, at = _take_string(data, 0)
    (count,) = _U16.unpack_from(data, at)
    at += _U16.size
    _require(len(data) == at + 2 * count)
    return name, struct.unpack_from(f">{count}H", data, at)


def _parse_queries(data: bytes) -> tuple[bytes, Sequence[bytes]]:
    """The export's name and the queries; struct.error if malformed."""
    name, at = _take_string(data, 0)
    (count,) = _U32.unpack_from(data, at)
    at += _U32.size
    _require(count <= len(data))
    queries = []
    for _ in range(count):
        query, at = _take_string(data, at)
        queries.append(query)
    _require(at == len(data))
    return name, queries


def _take_string(data: bytes, at: int) -> tuple[bytes, int]:
    (length,) = _U32.unpack_from(data, at)
    at += _U32.size
    _require(length <= min(len(data) - at, nbd.MAX_STRING))
    return data[at : at + length], at + length


def _require(condition: bool) -> None:
    if not condition:
        raise struct.error
