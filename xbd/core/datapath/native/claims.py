"""Parts of drivers' tables that are lent to the I/O threads; see `Claims`."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from xbd.core.datapath.native import ffi, lib

_AT_A_TIME: Final = 1024


class NativeClaims:
    """Of one disk."""

    def __init__(self, extents: Any) -> None:
        """`extents`: the handle of the disk's."""
        made = lib.xbd_claims_new(extents)
        if made == ffi.NULL:
            raise MemoryError
        self._extents = extents  # outlives the handle
        self.handle: Any = ffi.gc(made, lib.xbd_claims_free)
        self._unit = 0
        """Bytes; 0: `begin` has not been called."""
        self.copying = False
        """As `begin` was told."""
        self._lent: dict[int, Any] = {}
        """The memory of what is lent, by offset."""

    @property
    def largest_copy(self) -> int:
        """See `Claims.largest_copy`."""
        largest: int = lib.XBD_LARGEST_COPY
        return largest

    def begin(
        self,
        fd: int,
        table_fd: int,
        unit: int,
        bits: int,
        *,
        behind: bool = False,
        copying: bool = False,
    ) -> None:
        """See `Claims.begin`."""
        if unit < 1 or unit & (unit - 1):
            raise ValueError(f"a unit of {unit} bytes is no power of two")
        if not lib.xbd_claims_begin(self.handle, fd, table_fd, unit, bits, behind, copying):
            raise MemoryError
        self._unit = unit
        self.copying = copying
        self._lent.clear()

    def lend(self, offset: int, entries: array[int], position: int) -> None:
        """See `Claims.lend`."""
        if not self._unit or offset % self._unit:
            raise ValueError(f"nothing can be lent from {offset} on in units of {self._unit} bytes")
        memory = ffi.from_buffer("uint64_t[]", entries, require_writable=True)
        lib.xbd_claims_lend(self.handle, offset, memory, len(entries), position)
        self._lent[offset] = memory

    def take_back(self, offset: int) -> None:
        """See `Claims.take_back`."""
        lib.xbd_claims_take_back(self.handle, offset)
        self._lent.pop(offset, None)

    def take(self, start: int, end: int) -> bool:
        """Find places for all of a range, as the threads do; false: the driver has to be asked.

        Writes to a file, through the page cache.
        """
        taken: bool = lib.xbd_claims_take(self.handle, start, end - start)
        return taken

    def whole_units(self, offset: int, length: int) -> tuple[int, int]:
        """The units of a range: where the first begins and the last ends."""
        return offset - offset % self._unit, offset + length + -(offset + length) % self._unit

    def supply(self, places: Sequence[int]) -> int:
        """See `Claims.supply`."""
        if not self._unit:
            raise ValueError("nothing has begun")
        taken: int = lib.xbd_claims_supply(self.handle, places, len(places))
        return taken

    @property
    def supplied(self) -> int:
        """See `Claims.supplied`."""
        left: int = lib.xbd_claims_supplied(self.handle)
        return left

    def end(self) -> list[int]:
        """See `Claims.end`."""
        places = self._fetch(lib.xbd_claims_end)
        self._lent.clear()
        return places

    def spoilt(self) -> list[int]:
        """See `Claims.spoilt`."""
        return self._fetch(lib.xbd_claims_spoilt)

    def _fetch(self, function: Any) -> list[int]:
        places: list[int] = []
        some = ffi.new("uint64_t[]", _AT_A_TIME)
        while count := function(self.handle, some, _AT_A_TIME):
            places.extend(some[0:count])
        return places

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Nothing is claimed inside."""
        idle = lib.xbd_claims_pause(self.handle)
        try:
            if not idle:
                await trio.to_thread.run_sync(lib.xbd_claims_wait, self.handle)
            yield
        finally:
            lib.xbd_claims_resume(self.handle)
