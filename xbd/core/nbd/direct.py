"""I/O past the driver: on extents that it resolved, and until it takes them back."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable
from typing import Final

import attrs
import trio

from xbd.core.driver import DeviceAccess
from xbd.core.hostio.failures import io_failure
from xbd.core.hostio.files import O_DIRECT
from xbd.core.nbd.claims import TableClaims
from xbd.core.nbd.engine import Engine, Transfer
from xbd.core.nbd.extents import Entry, Extents
from xbd.core.units import MIB

NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)
"""For preadv: only what is in the page cache.  0 where the system can't do that."""

_READ_AHEAD: Final = 32 * MIB
"""More than this at a time would throw out what is in use."""


@attrs.define(eq=False)
class _Advice:
    """The kernel is being told what will be read."""

    offset: int
    length: int


class DirectIo:
    """For all connections of one export."""

    def __init__(
        self, access: DeviceAccess, engine: Engine, claims: TableClaims | None = None
    ) -> None:
        """`claims`: what the driver may lend tables to."""
        self._extents = (Extents(), Extents())
        """For reading, and for writing."""
        self._access = access
        self._engine = engine
        self._claims = claims
        self._in_flight: set[Transfer | _Advice] = set()
        self._ended = trio.lowlevel.ParkingLot()
        self._limiter = trio.CapacityLimiter(1)
        self._cached: dict[int, bool] = {}
        """By fd: whether it goes through the page cache, and can be asked without waiting."""
        geometry = access.geometry
        self._unit = max(geometry.request_alignment, geometry.memory_alignment)

    def fits(self, offset: int, length: int) -> bool:
        """Whether the driver and the host take a transfer of this range as it is."""
        return not (offset | length) % self._unit

    def find(self, offset: int, length: int, *, for_write: bool) -> Entry | None:
        """Where a range lies, or None: use the driver's methods."""
        if (offset | length) % self._unit:
            return None
        known = self._extents[for_write]
        end = offset + length
        entry = known.find(offset, end)
        if entry is None and for_write and self._claims is not None:
            for made in self._claims.take(offset, end):
                known.add(made)
            entry = known.find(offset, end)
        if entry is None:
            at = offset
            for extent in self._access.resolve(offset, length, for_write=for_write) or ():
                known.add((at, at + extent.length, extent.fd, extent.offset - at))
                at += extent.length
            entry = known.find(offset, end)
        return entry

    def is_cached(self, fd: int) -> bool:
        """Whether reading with RWF_NOWAIT makes sense."""
        cached = self._cached.get(fd)
        if cached is None:
            cached = NOWAIT != 0 and not fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT
            self._cached[fd] = cached
        return cached

    def never_cached(self, fd: int) -> None:
        """It can't be read with RWF_NOWAIT."""
        self._cached[fd] = False

    def start(self, transfer: Transfer, entry: Entry) -> None:
        """Queue a transfer; `kick` the engine afterwards."""
        self._in_flight.add(transfer)
        self._engine.start(transfer, entry[2], transfer.offset + entry[3])

    def kick(self) -> None:
        """Set off what was queued."""
        self._engine.kick()

    def ended(self, transfers: Iterable[Transfer | _Advice]) -> None:
        """These have ended, one way or the other; owners tell before anything else."""
        self._in_flight.difference_update(transfers)
        if self._ended:
            self._ended.unpark_all()

    async def read_ahead(self, offset: int, length: int) -> None:
        """Have the host cache a range, if it caches this file at all."""
        length = min(length, _READ_AHEAD)
        entry = self.find(offset, length, for_write=False)
        if entry is None or not self.is_cached(entry[2]):
            return
        advice = _Advice(offset, length)
        self._in_flight.add(advice)
        arguments = (entry[2], offset + entry[3], length, os.POSIX_FADV_WILLNEED)
        try:
            with trio.CancelScope(shield=True):  # the thread uses the file
                await trio.to_thread.run_sync(os.posix_fadvise, *arguments, limiter=self._limiter)
        except OSError as error:
            raise io_failure(f"reading ahead at {offset}", error.errno or errno.EIO) from error
        finally:
            self.ended((advice,))

    async def invalidate(self, offset: int, length: int) -> None:
        """For `DeviceAccess.subscribe`: forget, and wait for transfers in flight in the range.

        It waits for nothing that waits for the driver.
        """
        end = offset + length
        for known in self._extents:
            known.forget(offset, end)
        self._cached.clear()  # a descriptor's number may come back as another file's
        old = {
            transfer
            for transfer in self._in_flight
            if transfer.offset < end and offset < transfer.offset + transfer.length
        }
        while old & self._in_flight:
            await self._ended.park()
