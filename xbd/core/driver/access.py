"""The layer over a driver that everything else uses: any range, any buffer, only known errors.

A driver may trust what it is called with because of what happens here; see `BlockDevice`.
"""

from __future__ import annotations

import errno
import logging
import mmap
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import attrs
import trio

from xbd.core.driver.api import (
    BlockDevice,
    BlockStatus,
    Capability,
    Claims,
    Concurrency,
    Extent,
    Geometry,
    HostExtent,
    ReadRequest,
    WriteRequest,
)
from xbd.core.driver.buffers import Cursor, aligned_buffer, gather, is_aligned, scatter, total
from xbd.core.driver.failures import request_error
from xbd.core.driver.geometry import geometry_problem, request_unit
from xbd.core.driver.ranges import RangeLock
from xbd.core.errors import DeviceBroken, DriverError, OpenFailed, Unsupported
from xbd.core.units import MIB

_log = logging.getLogger(__name__)

_NEEDS_WRITING: Final = (
    Capability.WRITE
    | Capability.DISCARD
    | Capability.WRITE_ZEROES
    | Capability.RESIZE
    | Capability.SNAPSHOT
)
_END_OF_EVERYTHING: Final = 1 << 63
_zeroes: Final = memoryview(mmap.mmap(-1, MIB, prot=mmap.PROT_READ | mmap.PROT_WRITE))
"""Never written.  Writable, so that its address can be taken without copying."""

RequestT = TypeVar("RequestT", ReadRequest, WriteRequest)
Invalidate = Callable[[int, int], Awaitable[None]]
"""``await forget(offset, length)``: drop answers of `resolve`, wait for I/O through them."""


class DiskClaims(Claims, Protocol):
    """A data path's, of one disk."""

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Nothing is claimed inside."""


class DeviceAccess:
    """An opened disk for the rest of the program.  Offsets and lengths are bytes.

    Raises `DriverError` and nothing else; what a driver should not have raised is logged with its
    traceback, counted in `bugs`, and becomes a `DriverError` with EIO.  Cancelling a call leaves
    its buffers alone once the call has raised.
    """

    def __init__(
        self, device: BlockDevice, *, device_id: str, concurrency: Concurrency, writable: bool
    ) -> None:
        self.device_id = device_id
        self.capabilities: Capability = device.capabilities
        """Asked once.  What needs writing is missing on a disk opened read-only."""
        if not writable or Capability.WRITE not in self.capabilities:
            self.capabilities &= ~_NEEDS_WRITING
        self.generation = 0
        """Grows whenever answers of `resolve` become invalid."""
        self.claims: DiskClaims | None = None
        """Of the data path, if it takes places by itself."""
        self.bugs = 0
        """Exceptions from the driver that no driver may raise."""
        self._device = device
        self._ranges = RangeLock()
        self._serial = trio.Lock() if concurrency is Concurrency.SERIAL else None
        self._order = trio.Lock()
        """Held while what an administrator asked for is done.  It is not the guest who waits for
        it, so nobody else would keep the disk from being closed meanwhile."""
        self._listeners: list[Invalidate] = []
        self._closed = False
        self._condemned: str | None = None
        self._batching: bool = device.batching
        self._adopt(device.geometry)

    # -- what it is -------------------------------------------------------------------------

    @property
    def device(self) -> BlockDevice:
        """The driver's own object, to look at: calls past this layer break its promises."""
        return self._device

    @property
    def geometry(self) -> Geometry:
        """Asked when the disk was opened and when it was resized."""
        return self._geometry

    def _adopt(self, geometry: Geometry) -> None:
        problem = geometry_problem(geometry)
        if problem is not None:
            raise OpenFailed(f"{self.device_id}: the driver's geometry is impossible: {problem}")
        self._geometry = geometry
        self._unit = request_unit(geometry)
        self._chunk = geometry.max_transfer - geometry.max_transfer % self._unit

    # -- data -------------------------------------------------------------------------------

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from `offset` on."""
        end = offset + total(buffers)
        self._check(offset, end)
        cursor = Cursor(buffers)
        for start, stop in self._pieces(offset, end):
            await self._read_piece(start, stop, cursor.take(stop - start))

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers, one after the other, from `offset` on."""
        end = offset + total(buffers)
        self._require(Capability.WRITE, "written", errno.EROFS)
        self._check(offset, end)
        cursor = Cursor(buffers)
        for start, stop in self._pieces(offset, end):
            await self._write_piece(start, stop, cursor.take(stop - start))

    def takes_with_others(self, offset: int, length: int, *, read_only: bool = False) -> bool:
        """Whether `read_many` and `write_many` are for such requests, with aligned buffers.

        `read_only`: these can't be written to, so drivers could not see that they are aligned.
        """
        return (
            self._batching
            and not (read_only and self._geometry.memory_alignment > 1)
            and length <= self._chunk
            and self._widen(offset, offset + length) == (offset, offset + length)
        )

    async def read_many(self, requests: Sequence[ReadRequest]) -> None:
        """Read all, in any order; each one's `error` says how it went, or this raises for all.

        Each is one that `takes_with_others`, and its buffers meet the geometry's alignment.
        """
        there = self._those_inside(requests)
        if there:
            low, high = _hull(there)
            await self._call("reading", low, high, partial(self._device.read_many, there))

    async def write_many(self, requests: Sequence[WriteRequest]) -> None:
        """As `read_many`."""
        self._require(Capability.WRITE, "written", errno.EROFS)
        low, high = _hull(requests)
        async with self._ranges.hold(low, high, exclusive=False):
            there = self._those_inside(requests)  # the disk may have shrunk while we waited
            if there:
                await self._call("writing", low, high, partial(self._device.write_many, there))

    def _those_inside(self, requests: Sequence[RequestT]) -> list[RequestT]:
        """The requests that are inside the disk; the others have failed."""
        self._check(0, 0)
        inside = []
        for request in requests:
            try:
                self._check(request.offset, request.offset + total(request.buffers))
            except DriverError as error:
                request.error = error
            else:
                inside.append(request)
        return inside

    async def _read_piece(self, start: int, stop: int, buffers: Sequence[memoryview]) -> None:
        low, high = self._widen(start, stop)
        if (low, high) == (start, stop) and self._fit(buffers):
            await self._call("reading", low, high, partial(self._device.readv, low, buffers))
            return
        bounce = aligned_buffer(high - low, self._geometry.memory_alignment)
        await self._call("reading", low, high, partial(self._device.readv, low, [bounce]))
        scatter(bounce[start - low : stop - low], buffers)

    async def _write_piece(self, start: int, stop: int, buffers: Sequence[memoryview]) -> None:
        low, high = self._widen(start, stop)
        whole = (low, high) == (start, stop)
        async with (
            self._ranges.hold(low, high, exclusive=False) if whole else self._alone(low, high)
        ):
            self._check(start, stop)  # the disk may have shrunk while we waited
            if not (whole and self._fit(buffers)):
                bounce = aligned_buffer(high - low, self._geometry.memory_alignment)
                if not whole:
                    await self._read_edges(start, stop, bounce)
                gather(buffers, bounce[start - low : stop - low])
                buffers = [bounce]
            await self._call("writing", low, high, partial(self._device.writev, low, buffers))

    async def _read_edges(self, start: int, stop: int, bounce: memoryview) -> None:
        """Read what a write does not cover of its first and its last block."""
        low, high = self._widen(start, stop)
        # The data path writes to resolved extents without asking: take them back first.
        await self.invalidate(low, high - low)
        edges = {}
        if low < start:
            edges[low] = min(low + self._unit, high)
        if stop < high:
            edges[stop - stop % self._unit] = high
        for begin, end in edges.items():
            part = bounce[begin - low : end - low]
            await self._call("reading", begin, end, partial(self._device.readv, begin, [part]))

    def _fit(self, buffers: Sequence[memoryview]) -> bool:
        return is_aligned(buffers, self._geometry.memory_alignment)

    def _pieces(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """The range in pieces which, widened to whole units, don't exceed `max_transfer`."""
        while offset < end:
            stop = min(end, offset - offset % self._unit + self._chunk)
            yield offset, stop
            offset = stop

    def _widen(self, start: int, stop: int) -> tuple[int, int]:
        """The range in whole units; the disk's end may cut the last one short."""
        low = start - start % self._unit
        return low, min(stop + -stop % self._unit, self._geometry.size)

    # -- everything else --------------------------------------------------------------------

    async def flush(self) -> None:
        """Make durable what was written before; nothing to do where every write already is."""
        self._check(0, 0)
        if Capability.FLUSH in self.capabilities:
            await self._call("flushing", 0, self._geometry.size, self._device.flush)
        else:
            await trio.lowlevel.checkpoint()

    async def discard(self, extents: Sequence[Extent]) -> None:
        """Drop the content of the extents, as far as whole discard blocks lie inside."""
        self._require(Capability.DISCARD, "discarded")
        for extent in extents:
            self._check(extent.offset, extent.offset + extent.length)
        whole = [narrowed for extent in extents if (narrowed := self._narrow(extent)) is not None]
        if not whole:
            await trio.lowlevel.checkpoint()
            return
        low, high = _reach(whole)
        async with self._ranges.hold(low, high, exclusive=False):
            self._check(low, high)
            await self._call("discarding", low, high, partial(self._device.discard, whole))

    def _narrow(self, extent: Extent) -> Extent | None:
        granularity = max(self._geometry.discard_granularity, self._unit)
        shift = self._geometry.discard_alignment
        start = extent.offset + -(extent.offset - shift) % granularity
        stop = extent.offset + extent.length
        if stop != self._geometry.size:
            stop -= (stop - shift) % granularity
        return Extent(offset=start, length=stop - start) if start < stop else None

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Make the range read as zeroes; `may_unmap` allows to free the space."""
        self._require(Capability.WRITE, "written", errno.EROFS)
        end = offset + length
        self._check(offset, end)
        inner = min(offset + -offset % self._unit, end)
        outer = max(end if end == self._geometry.size else end - end % self._unit, inner)
        await self._write_zero_bytes(offset, inner)
        if inner < outer and not await self._zero_natively(inner, outer, may_unmap):
            await self._write_zero_bytes(inner, outer)
        await self._write_zero_bytes(outer, end)

    async def _zero_natively(self, low: int, high: int, may_unmap: bool) -> bool:
        if Capability.WRITE_ZEROES not in self.capabilities:
            return False
        zero = partial(self._device.write_zeroes, low, high - low, may_unmap=may_unmap)
        async with self._ranges.hold(low, high, exclusive=False):
            self._check(low, high)
            try:
                await self._call("zeroing", low, high, zero)
            except Unsupported:
                return False
        return True

    async def _write_zero_bytes(self, start: int, stop: int) -> None:
        while start < stop:
            length = min(stop - start, len(_zeroes))
            await self.writev(start, [_zeroes[:length]])
            start += length

    async def resize(self, size: int) -> Geometry:
        """Change the size; returns the new geometry."""
        self._require(Capability.RESIZE, "resized")
        old = self._geometry.size
        if size < 0 or size % self._geometry.logical_block:
            raise DriverError(
                f"{self.device_id}: a size of {size} bytes is not a multiple of the logical block",
                errno=errno.EINVAL,
            )
        async with self._alone(0, _END_OF_EVERYTHING):
            await self.invalidate(min(size, old), _END_OF_EVERYTHING)
            async with self.kept_open():
                geometry = await self._call("resizing", 0, size, partial(self._device.resize, size))
                self._adopt(geometry)
            # While the driver worked, reading could still be resolved.
            await self.invalidate(min(size, old), _END_OF_EVERYTHING)
        return self._geometry

    async def create_snapshot(self, name: str) -> None:
        """Keep the disk, inside its image, as all finished calls and resolved I/O left it.

        Waits for those who are just writing; who wants to write waits until it is done.
        """
        self._require(Capability.SNAPSHOT, "kept in snapshots")
        creating = partial(self._device.create_snapshot, name)
        async with self._alone(0, _END_OF_EVERYTHING):
            # From here on nothing resolves for writing: see `resolve`.
            await self.invalidate(0, _END_OF_EVERYTHING)
            async with self.kept_open():
                await self._call("taking a snapshot of", 0, self._geometry.size, creating)

    def condemn(self, reason: str) -> None:
        """Nothing can be done any more but to close it: everything else raises `DeviceBroken`."""
        self._condemned = reason

    def require_sound(self) -> None:
        """Raises `DeviceBroken` if it was condemned."""
        if self._condemned is not None:
            raise DeviceBroken(f"{self.device_id}: {self._condemned}")

    @asynccontextmanager
    async def kept_open(self) -> AsyncIterator[None]:
        """`aclose` waits meanwhile; for one at a time.  Raises `DeviceBroken` if it is closed."""
        async with self._order:
            self._check(0, 0)
            yield

    async def aclose(self) -> None:
        """Release everything, even when cancelled.  Idempotent; implies no flush."""
        if not self._closed:
            self._closed = True
            with trio.CancelScope(shield=True):
                async with self._order:
                    await self._call("closing", 0, 0, self._device.aclose)

    async def block_status(self, offset: int, length: int) -> list[BlockStatus]:
        """What lies in the range; the answers cover exactly it, neighbours of one kind as one."""
        end = offset + length
        self._check(offset, end)
        told: list[BlockStatus] = []
        while offset < end:
            low, high = self._widen(offset, end)
            asking = partial(self._device.block_status, low, high - low)
            answer: Sequence[BlockStatus] = await self._call("asking about", low, high, asking)
            at = low
            for status in answer:
                stop = min(at + status.length, end)
                if stop > offset:
                    _append(told, attrs.evolve(status, length=stop - offset))
                    offset = stop
                at = stop
            if at <= low:
                raise DriverError(f"{self.device_id}: the driver tells nothing of byte {low}")
        return told

    # -- resolved extents -------------------------------------------------------------------

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        """Where these bytes lie in host files: see `BlockDevice.resolve`."""
        if self._closed or self._condemned is not None:
            return None
        if for_write and Capability.WRITE not in self.capabilities:
            return None
        try:
            answer = self._device.resolve(offset, length, for_write=for_write)
        except Exception as error:
            self._failure("resolving", offset, offset + length, error)
            return None
        if not all(map(_is_possible, answer or ())):
            bug = ValueError(f"an answer that can't be: {answer}")
            self._failure("resolving", offset, offset + length, bug)
            return None
        if not answer or not for_write:
            return answer
        reach = offset + sum(extent.length for extent in answer)
        limit = self._ranges.first_exclusive(offset, reach)
        return answer if limit is None else _cut(answer, limit - offset)

    def zeroes(self, offset: int, length: int) -> int:
        """How much of the disk reads as zeroes from `offset` on: see `BlockDevice.zeroes`."""
        if self._closed or self._condemned is not None:
            return 0
        try:
            found = self._device.zeroes(offset, length)
        except Exception as error:
            self._failure("looking for zeroes in", offset, offset + length, error)
            return 0
        return max(0, min(found, self._geometry.size - offset))

    def can_place(self, offset: int, length: int) -> bool:
        """Whether `place` is of use for this range: see `BlockDevice.can_place`."""
        if self._closed or self._condemned is not None or Capability.WRITE not in self.capabilities:
            return False
        try:
            return self._device.can_place(offset, length)
        except Exception as error:
            self._failure("placing", offset, offset + length, error)
            return False

    async def place(self, extents: Sequence[Extent]) -> None:
        """Have `resolve` know more of these ranges for writing: see `BlockDevice.place`."""
        self._require(Capability.WRITE, "written", errno.EROFS)
        low, high = _reach(extents) if extents else (0, self._geometry.size)
        async with self._ranges.hold(low, high, exclusive=False):
            self._check(low, high)  # the disk may have shrunk while we waited
            await self._call("placing", low, high, partial(self._device.place, extents))

    @asynccontextmanager
    async def _alone(self, low: int, high: int) -> AsyncIterator[None]:
        """Hold a range exclusively: nothing new is resolved for writing there."""
        async with self._ranges.hold(low, high, exclusive=True):
            if self.claims is None:
                yield
            else:
                async with self.claims.paused():
                    yield

    def subscribe(self, listener: Invalidate) -> None:
        """Have `listener` awaited whenever answers of `resolve` become invalid."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: Invalidate) -> None:
        """Undo `subscribe`."""
        self._listeners.remove(listener)

    async def invalidate(self, offset: int, length: int) -> None:
        """For the driver: see `OpenContext.invalidate`."""
        self.generation += 1
        for listener in tuple(self._listeners):
            await listener(offset, length)

    # -- the only way into the driver -------------------------------------------------------

    async def _call(
        self, what: str, low: int, high: int, method: Callable[[], Awaitable[Any]]
    ) -> Any:
        try:
            if self._serial is None:
                return await method()
            async with self._serial:
                return await method()
        except DriverError:
            raise
        except Exception as error:
            raise self._failure(what, low, high, error) from error
        except BaseExceptionGroup as group:
            # Cancelled, and something else failed at the same time in the driver's own tasks.
            failed, cancelled = group.split(Exception)
            if failed is None or cancelled is None:
                raise
            self._failure(what, low, high, failed)
            raise cancelled from None

    def _failure(self, what: str, low: int, high: int, error: Exception) -> DriverError:
        where = f"{self.device_id}: {what} {high - low} bytes at {low}"
        known = request_error(where, error)
        if known is not None:
            return known
        self.bugs += 1
        _log.error("%s: bug in the driver", where, exc_info=error)
        return DriverError(f"{where}: bug in the driver: {type(error).__name__}", errno=errno.EIO)

    def _require(self, capability: Capability, verb: str, number: int = errno.EOPNOTSUPP) -> None:
        if capability not in self.capabilities:
            raise Unsupported(f"{self.device_id}: can't be {verb}", errno=number)

    def _check(self, start: int, stop: int) -> None:
        if self._closed:
            raise DeviceBroken(f"{self.device_id}: is closed", errno=errno.EBADF)
        self.require_sound()
        if not 0 <= start <= stop <= self._geometry.size:
            raise DriverError(
                f"{self.device_id}: {stop - start} bytes at {start} are outside the disk",
                errno=errno.EINVAL,
            )


def _is_possible(extent: HostExtent) -> bool:
    end = extent.offset + extent.length
    return extent.fd >= 0 and 0 <= extent.offset < end <= _END_OF_EVERYTHING


def _reach(extents: Sequence[Extent]) -> tuple[int, int]:
    """Where the first byte of them all is, and where the last one ends."""
    low = min(extent.offset for extent in extents)
    return low, max(extent.offset + extent.length for extent in extents)


def _hull(requests: Sequence[ReadRequest | WriteRequest]) -> tuple[int, int]:
    """As `_reach`."""
    low = min(request.offset for request in requests)
    return low, max(request.offset + total(request.buffers) for request in requests)


def _append(told: list[BlockStatus], status: BlockStatus) -> None:
    if told and (told[-1].hole, told[-1].zero) == (status.hole, status.zero):
        told[-1] = attrs.evolve(status, length=told[-1].length + status.length)
    else:
        told.append(status)


def _cut(extents: Sequence[HostExtent], length: int) -> list[HostExtent] | None:
    """The extents' first `length` bytes."""
    kept = []
    for extent in extents:
        if length <= 0:
            break
        size = min(extent.length, length)
        kept.append(HostExtent(fd=extent.fd, offset=extent.offset, length=size))
        length -= size
    return kept or None
