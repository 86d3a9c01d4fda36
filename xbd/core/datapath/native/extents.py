"""What drivers answered to `resolve`, where the I/O threads find it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from xbd.core.datapath.extents import Resolver
from xbd.core.datapath.native import ffi, lib
from xbd.core.datapath.native.claims import NativeClaims
from xbd.core.driver import HostExtent
from xbd.core.units import MIB

_MAX_PIECES: Final = 64
"""Places in host files that one request may be spread over; as in the threads."""
_REGION: Final = 4 * MIB
"""Of the disk, in which drivers are asked from the beginning on before anything is copied."""
_pieces: Final = ffi.new("struct xbd_piece[]", _MAX_PIECES) if ffi is not None else None
"""Where they are told, and nobody looks: how many they are is enough."""


class NativeExtents:
    """Of one disk.  The threads look things up at any time."""

    def __init__(self, resolve: Resolver) -> None:
        made = lib.xbd_extents_new()
        if made == ffi.NULL:
            raise MemoryError
        self.handle: Any = ffi.gc(made, lib.xbd_extents_free)
        self.claims = NativeClaims(self.handle)
        """For places that the threads find by themselves: they are known here at once."""
        self._resolve = resolve
        self._whole = [True, True]
        """By direction: whether all extents so far ended where a chunk ends; what the driver
        says of a chunk's beginning is then true of the chunk."""

    def learn(self, offset: int, length: int, *, for_write: bool) -> bool:
        """Ask the driver where the range lies, if need be.  Whether all of it is known now."""
        if self._is_known(offset, length, for_write):
            return True  # by an answer to somebody else
        at, stop = offset, offset + length
        while at < stop:
            chunk: int = lib.xbd_extents_chunk(self.handle, for_write)
            start = at - at % chunk
            reach = self._ask(start, stop, for_write)
            if reach <= at and start < at and not self._whole[for_write]:
                reach = self._ask(at, stop, for_write)
            if reach <= at:
                return False
            at = reach
        return self._is_known(offset, length, for_write)

    def can_copy(self, offset: int, length: int) -> bool:
        """Whether the threads can write for the first time to this range, and copy the rest."""
        if not lib.xbd_claims_can_copy(self.claims.handle, offset, length):
            return False
        start, stop = self.claims.whole_units(offset, length)
        if not self._is_known(start, stop - start, False):
            # Neighbours will be asked for; from here on, answers fit each other without gaps.
            self._ask(start - start % _REGION, stop, False)
        return self.learn(start, stop - start, for_write=False)

    def _is_known(self, offset: int, length: int, for_write: bool) -> bool:
        found: int = lib.xbd_extents_find(
            self.handle, for_write, offset, length, _pieces, _MAX_PIECES
        )
        return found > 0

    def _ask(self, start: int, stop: int, for_write: bool) -> int:
        """Learn where the range's beginning lies; how far."""
        losses = lib.xbd_extents_losses(self.handle)
        answer: Sequence[HostExtent] = self._resolve(start, stop - start, for_write=for_write) or ()
        for extent in answer:
            end = start + extent.length
            # Threads that make entries may know better by now.
            if not lib.xbd_extents_add(
                self.handle, for_write, start, end, extent.fd, extent.offset, losses
            ):
                return start
            if end % lib.xbd_extents_chunk(self.handle, for_write):
                self._whole[for_write] = False
            start = end
        return start

    def forget(self, offset: int, length: int) -> bool:
        """Drop what is known of a range.  Whether I/O through it may be in flight."""
        known: bool = lib.xbd_extents_forget(self.handle, offset, min(length, (1 << 64) - 1))
        return known
