"""A device that finds places for first writes, and notes what it is asked for."""

from __future__ import annotations

import trio

from xbd.core.driver import Geometry, HostExtent
from xbd.core.driver.testing import MemoryDevice
from xbd.core.units import KIB, MIB

UNIT = 64 * KIB


class Placing(MemoryDevice):
    """Units resolve when they have been placed; only every third can't be."""

    def __init__(self, size: int = 2 * MIB, geometry: Geometry | None = None) -> None:
        super().__init__(size, geometry=geometry)
        self.places: set[int] = set()
        self.calls: list[list[tuple[int, int]]] = []
        self.written: list[int] = []
        self.error: Exception | None = None
        self.held: trio.Event | None = None

    def resolve(self, offset, length, *, for_write):
        first = offset // UNIT
        if first not in self.places:
            return None
        return [HostExtent(fd=self._fd, offset=offset, length=(first + 1) * UNIT - offset)]

    def can_place(self, offset, length):
        return offset // UNIT not in self.places

    async def place(self, extents):
        self.calls.append([(extent.offset, extent.length) for extent in extents])
        await trio.lowlevel.checkpoint()
        if self.held is not None:
            await self.held.wait()
        if self.error is not None:
            raise self.error
        for extent in extents:
            if extent.offset // UNIT % 3 != 2:
                self.places.add(extent.offset // UNIT)

    async def writev(self, offset, buffers):
        self.written.append(offset)
        await super().writev(offset, buffers)
