"""What drivers answered to `resolve`, where the I/O threads find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from xbd.core.datapath.extents import Resolver
from xbd.core.datapath.native import ffi, lib
from xbd.core.datapath.native.claims import NativeClaims
from xbd.core.driver import HostExtent
from xbd.core.units import MIB

_MAX_PIECES: Final = 64
"""Places in host files that one request may be spread over; as in the threads."""
_REGION: Final = 4 * MIB
"""Of the disk: drivers that tell many extents at a time are asked for it from the beginning on."""
_pieces: Final[Any] = ffi.new("struct xbd_piece[]", _MAX_PIECES) if ffi is not None else None
"""Where they are told."""


class NativeExtents:
    """Of one disk.  The threads look things up at any time."""

    def __init__(
        self, resolve: Resolver, zeroes: Callable[[int, int], int] = lambda offset, length: 0
    ) -> None:
        """Both as the driver's methods of these names."""
        made = lib.xbd_extents_new()
        if made == ffi.NULL:
            raise MemoryError
        self.handle: Any = ffi.gc(made, lib.xbd_extents_free)
        self.claims = NativeClaims(self.handle)
        """For places that the threads find by themselves: they are known here at once."""
        self._resolve = resolve
        self._zeroes = zeroes
        self._whole = [True, True]
        """By direction: whether all extents so far ended where a chunk ends; what the driver
        says of a chunk's beginning is then true of the chunk."""
        self._many = [False, False]
        """By direction: whether the driver has ever told several extents at a time; then regions
        are learnt as a whole, so that answers fit each other without gaps."""

    def learn(self, offset: int, length: int, *, for_write: bool) -> bool:
        """Ask the driver where the range lies, if need be.  Whether all of it is known now."""
        if self._is_known(offset, length, for_write):
            return True  # by an answer to somebody else
        at, stop = offset, offset + length
        while at < stop:
            chunk: int = lib.xbd_extents_chunk(self.handle, for_write)
            start = at - at % chunk
            reach = self._ask(at - at % _REGION, stop, for_write) if self._many[for_write] else 0
            if reach <= at:
                reach = self._ask(start, stop, for_write)
            if reach <= at and start < at and not self._whole[for_write]:
                reach = self._ask(at, stop, for_write)
            if reach <= at:
                return False
            at = reach
        return self._is_known(offset, length, for_write)

    def can_claim(self, offset: int, length: int) -> bool:
        """Whether the threads can find places for first writes to all of this range."""
        if not lib.xbd_claims_are_free(self.claims.handle, offset, length):
            return False
        start, stop = self.claims.whole_units(offset, length)
        if not self.learn(start, stop - start, for_write=False):
            return False
        return self.claims.copying or self._is_zero(start, stop - start)

    def _is_zero(self, offset: int, length: int) -> bool:
        count = self._find(offset, length, False)
        return count > 0 and all(piece.fd == lib.XBD_ZEROES for piece in _pieces[0:count])

    def _find(self, offset: int, length: int, for_write: bool) -> int:
        found: int = lib.xbd_extents_find(
            self.handle, for_write, offset, length, _pieces, _MAX_PIECES
        )
        return found

    def _is_known(self, offset: int, length: int, for_write: bool) -> bool:
        return self._find(offset, length, for_write) > 0

    def _ask(self, start: int, stop: int, for_write: bool) -> int:
        """Learn where the range's beginning lies; how far."""
        losses = lib.xbd_extents_losses(self.handle)
        answer: Sequence[HostExtent] = self._resolve(start, stop - start, for_write=for_write) or ()
        self._many[for_write] |= len(answer) > 1
        for extent in answer:
            end = start + extent.length
            if not self._add(start, end, extent.fd, extent.offset, losses, for_write):
                return start
            start = end
        if start < stop and not for_write:
            end = start + self._zeroes(start, stop - start)
            if start < end and self._add(start, end, lib.XBD_ZEROES, start, losses, for_write):
                start = end
        return start

    def _add(
        self, start: int, end: int, fd: int, position: int, losses: int, for_write: bool
    ) -> bool:
        """Keep it, except where threads that make entries may know better by now."""
        added: bool = lib.xbd_extents_add(self.handle, for_write, start, end, fd, position, losses)
        if added and end % lib.xbd_extents_chunk(self.handle, for_write):
            self._whole[for_write] = False
        return added

    def forget(self, offset: int, length: int) -> bool:
        """Drop what is known of a range.  Whether I/O through it may be in flight."""
        known: bool = lib.xbd_extents_forget(self.handle, offset, min(length, (1 << 64) - 1))
        return known
