"""Requests that need the driver: everything but transfers on resolved extents.

NBD protocol document, section "Request types".  What is here raises `DriverError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from xbd.core.driver import BlockStatus, DeviceAccess, Extent
from xbd.core.driver.geometry import request_unit
from xbd.core.nbd import constants as nbd
from xbd.core.nbd import replies
from xbd.core.nbd.direct import DirectIo
from xbd.core.units import KIB, MIB

MAX_DESCRIPTORS: Final = 4096
"""Of one BLOCK_STATUS reply; the client asks again for the rest."""

_STATUS_PIECE: Final = 16 * MIB
"""What the driver is asked about at a time, at first; more where there is little to tell."""
_LONGEST_PIECE: Final = 256 * MIB
_FEW: Final = 64

_HOLES_FROM: Final = 64 * KIB
"""A shorter read is not worth asking for holes first."""
_MAX_CHUNKS: Final = 32
"""Of one read's reply."""

Part = bytes | memoryview


@attrs.frozen
class Request:
    """A request that passed all checks.  Offset and length are bytes."""

    kind: int
    flags: int
    cookie: int
    offset: int
    length: int


@attrs.frozen
class Commands:
    """Carries out requests; gives the parts of their replies."""

    access: DeviceAccess
    direct: DirectIo
    structured: bool
    """Whether replies are."""

    def is_special(self, flags: int, length: int, *, write: bool) -> bool:
        """Whether more than moving its bytes belongs to a transfer."""
        if write:
            return bool(flags & nbd.CMD_FLAG_FUA)
        return self.structured and length >= _HOLES_FROM and not flags & nbd.CMD_FLAG_DF

    async def carry_out(self, request: Request, memory: memoryview) -> Sequence[Part]:
        """`memory` is the data of a write, and the place for a read's; it may be in the reply."""
        offset, length, flags = request.offset, request.length, request.flags
        access = self.access
        match request.kind:
            case nbd.CMD_READ:
                return await self._read(request, memory)
            case nbd.CMD_WRITE:
                await access.writev(offset, [memory])
            case nbd.CMD_FLUSH:
                await access.flush()
                return (replies.done(request.cookie),)
            case nbd.CMD_TRIM:
                await access.discard([Extent(offset=offset, length=length)])
            case nbd.CMD_CACHE:
                await self.direct.read_ahead(offset, length)
                return (replies.done(request.cookie),)
            case nbd.CMD_WRITE_ZEROES:
                may_unmap = not flags & nbd.CMD_FLAG_NO_HOLE
                await access.write_zeroes(offset, length, may_unmap=may_unmap)
            case nbd.CMD_BLOCK_STATUS:
                told = await self._status(request, one=bool(flags & nbd.CMD_FLAG_REQ_ONE))
                return (replies.block_status(request.cookie, told),)
            case _:
                raise AssertionError(f"command {request.kind} was let through")
        if flags & nbd.CMD_FLAG_FUA:
            await access.flush()
        return (replies.done(request.cookie),)

    async def _read(self, request: Request, memory: memoryview) -> Sequence[Part]:
        start, end = request.offset, request.offset + request.length
        if not self.structured:
            await self.access.readv(start, [memory])
            return [replies.done(request.cookie), memory]
        told: Sequence[BlockStatus] = ()
        if self.is_special(request.flags, request.length, write=False):
            told = await self._zeroes(start, end)
        parts: list[Part] = []
        at = start
        for status in told or (BlockStatus(length=request.length, hole=False, zero=False),):
            stop = at + status.length
            if status.zero:
                parts.append(replies.hole(request.cookie, at, status.length, last=stop == end))
            else:
                piece = memory[at - start : stop - start]
                await self.access.readv(at, [piece])
                parts.append(replies.data(request.cookie, at, status.length, last=stop == end))
                parts.append(piece)
            at = stop
        return parts

    # -- holes and zeroes -------------------------------------------------------------------

    async def _zeroes(self, start: int, end: int) -> Sequence[BlockStatus]:
        """Data and zeroes of a range; nothing if there are too many of them."""
        told: list[BlockStatus] = []
        for status in await self._ask(start, end):
            _append(told, attrs.evolve(status, hole=status.zero))
        return told if len(told) <= _MAX_CHUNKS else ()

    async def _status(self, request: Request, *, one: bool) -> Sequence[BlockStatus]:
        """The first byte's at least."""
        offset, end = request.offset, request.offset + request.length
        told: list[BlockStatus] = []
        piece = _STATUS_PIECE
        while offset < end and len(told) < MAX_DESCRIPTORS and not (one and len(told) > 1):
            stop = min(offset + piece, end)
            answer = await self._ask(offset, stop)
            for status in answer:
                _append(told, status)
            offset = stop
            if len(answer) < _FEW:
                piece = min(2 * piece, _LONGEST_PIECE)
        return told[: 1 if one else MAX_DESCRIPTORS]

    async def _ask(self, start: int, end: int) -> Sequence[BlockStatus]:
        """Of whole units, cut to the range."""
        unit = request_unit(self.access.geometry)
        stop = min(end + -end % unit, self.access.geometry.size)
        told = []
        for status in await self.access.block_status(start, stop - start):
            if start < end:
                length = min(status.length, end - start)
                told.append(attrs.evolve(status, length=length))
                start += length
        return told


def _append(told: list[BlockStatus], status: BlockStatus) -> None:
    if told and (told[-1].hole, told[-1].zero) == (status.hole, status.zero):
        status = attrs.evolve(status, length=told.pop().length + status.length)
    told.append(status)
