"""A qcow2 image as a block device: the blocking `Image` behind trio.

What lies in plain clusters is resolved, and moved by the core.  Everything else comes here:
writes that arrive together share a thread hop, and are planned, written and linked together.
"""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import attrs
import trio

from xbd.core.driver import (
    BlockDevice,
    BlockStatus,
    Capability,
    Extent,
    Geometry,
    HostExtent,
    OpenContext,
    OpenFailed,
    ReadRequest,
    Unsupported,
    WriteRequest,
)
from xbd.core.driver.buffers import total
from xbd.core.hostio.hostfile import CACHE_NONE, CACHE_WRITEBACK
from xbd.core.hostio.locks import while_busy
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import snapshots
from xbd.drivers.qcow2.batches import Batches
from xbd.drivers.qcow2.compressing import CompressedWriter
from xbd.drivers.qcow2.host import PAGE
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import SECTOR
from xbd.drivers.qcow2.moved import Moved
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.options import Qcow2Options
from xbd.drivers.qcow2.placing import Placer
from xbd.drivers.qcow2.secrets import read_secret
from xbd.drivers.qcow2.sizing import set_size, size_problem
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

_EVERYTHING: Final = 1 << 63

_MOST_READ_BATCHES: Final = 4
_MOST_WRITE_BATCHES: Final = 2
"""At a time: storage works for one while the other one computes.  More are smaller, and pay for as
many flushes."""

_ALONE: Final = 256 * KIB
"""Bytes of reads that are work enough for a thread."""

_MOST_ALONE: Final = 2
"""Such reads at a time: storage works for one while the other one is unpacked, on all CPUs."""

_OWNED_SECONDS: Final = 0.001
"""How long others leave trio's thread to who used it for long work."""

SCAN_ENTRIES: Final = 128
"""Clusters or subclusters that one answer of `resolve` or `zeroes` looks at: some 10 us where they
follow each other."""


@asynccontextmanager
async def open_qcow2(context: OpenContext, options: Qcow2Options) -> AsyncIterator[BlockDevice]:
    """Open an image; raises `OpenFailed`.

    What is busy is tried again for a moment: the kernel may still be finishing requests of a
    daemon that was killed, and keeps its lock until then.
    """
    opening = partial(context.run_blocking, _open, context, options)
    image: Image = await while_busy(opening)
    device = Qcow2Device(
        context, image, discard=options.discard == "unmap", compress=options.compress
    )
    try:
        yield device
    finally:
        with trio.CancelScope(shield=True):
            await device.aclose()


def _open(context: OpenContext, options: Qcow2Options) -> Image:
    wishes = Wishes(
        writable=context.writable,
        direct=options.cache != CACHE_WRITEBACK,
        lock=options.locking,
        image_dirs=context.image_dirs,
        backing_format=options.backing_format,
        data_file=options.data_file,
        key=read_secret(options.key_file, options.key_credential),
        cache_bytes=options.l2_cache_size,
    )
    image = open_image(options.path, wishes)
    if options.cache == CACHE_NONE and not image.data_host.direct:
        image.close()
        raise OpenFailed(
            f"{image} can't be used without the page cache, because of its filesystem or its "
            "clusters of less than 4 KiB: set cache=writeback",
            errno=errno.EINVAL,
        )
    if options.compress and (image.cipher is not None or image.data_host is not image.host):
        image.close()
        raise OpenFailed(
            f"{image} can't have compressed clusters, because it is encrypted or has an external "
            "data file: leave compress out",
            errno=errno.EINVAL,
        )
    return image


@attrs.define(eq=False)
class Served:
    """What a call of `serve_blocking` leaves to do."""

    moved: list[tuple[int, int]]
    """Ranges (offset and length) of the disk that lie elsewhere now: answers of `resolve` for them
    have to be taken back."""
    end: Callable[[], None]
    """To be called, once and from any thread, when nobody uses those answers any more: what was
    there before is not used again until then."""


class _Owner:
    """Who does what takes some 100 us in trio's thread, and when it began that last."""

    device: Qcow2Device | None = None
    latest: float = 0.0


_owner: Final = _Owner()


class Qcow2Device(BlockDevice):
    """An open image."""

    def __init__(
        self,
        context: OpenContext,
        image: Image,
        *,
        discard: bool,
        compress: bool,
    ) -> None:
        self.image = image
        self._moved = image.moved = Moved()
        self._context = context
        self._run = context.run_blocking
        self._writer = Writer(image)
        self._zeroer = Zeroer(image, self._writer)
        # Apart, because writes may wait for the disk.
        self._reads: Batches[ReadRequest] = Batches(self._serve, _MOST_READ_BATCHES)
        self._writes: Batches[WriteRequest] = Batches(self._serve, _MOST_WRITE_BATCHES)
        self._long = trio.CapacityLimiter(_MOST_ALONE)
        self._write = (
            CompressedWriter(image, self._writer).write if compress else self._writer.write
        )
        self._placer = None if compress else Placer(image)
        self._discard = discard
        self._closed = False
        self._stopped = False
        """Nothing is written any more, not even through what was resolved for it."""

    @property
    def geometry(self) -> Geometry:
        image = self.image
        alignment = image.data_host.alignment
        return Geometry(
            size=image.size - image.size % SECTOR,
            physical_block=PAGE,
            request_alignment=alignment.offset,
            memory_alignment=alignment.memory,
            discard_granularity=image.tables.subcluster_size,
            # Only whole clusters can be compressed.
            max_transfer=max(MIB, image.header.cluster_size),
        )

    @property
    def capabilities(self) -> Capability:
        if not self._context.writable:
            return Capability.NONE
        capabilities = Capability.WRITE | Capability.FLUSH
        capabilities |= Capability.WRITE_ZEROES
        if self.image.data_host is self.image.host and size_problem(self.image.header) is None:
            capabilities |= Capability.RESIZE
        if snapshots.possible(self.image):
            capabilities |= Capability.SNAPSHOT
        return capabilities | Capability.DISCARD if self._discard else capabilities

    # -- data ---------------------------------------------------------------------------------

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        request = ReadRequest(offset, buffers)
        await self._read([request], gather=True)
        if request.error is not None:
            raise request.error

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        request = WriteRequest(offset, buffers)
        await self._writes.run([request])
        if request.error is not None:
            raise request.error

    @property
    def batching(self) -> bool:
        return True

    async def read_many(self, requests: Sequence[ReadRequest]) -> None:
        await self._read(requests, gather=False)

    async def _read(self, requests: Sequence[ReadRequest], *, gather: bool) -> None:
        read = self.image.read_known
        unpack = len(requests) == 1 and requests[0].alone and self._may_take_long()
        rest = [
            request
            for request in requests
            if not read(request.offset, request.buffers, unpack=unpack)
        ]
        if not rest:
            await trio.lowlevel.checkpoint()
        elif sum(total(request.buffers) for request in rest) > _ALONE:
            async with self._long:
                await self._serve(rest)
        else:
            await self._reads.run(rest, gather=gather)

    def _may_take_long(self) -> bool:
        """Whether no other image needs trio's thread for what takes some 100 us.

        When several unpack, it is done on all CPUs.
        """
        now = time.monotonic()
        if _owner.device not in (None, self) and now - _owner.latest <= _OWNED_SECONDS:
            return False
        _owner.device, _owner.latest = self, now
        return True

    async def write_many(self, requests: Sequence[WriteRequest]) -> None:
        await self._writes.run(requests, gather=False)

    async def _serve(self, requests: Sequence[ReadRequest | WriteRequest]) -> None:
        served: Served = await self._run(self.serve_blocking, requests)
        try:
            for start, end in _joined(served.moved):
                await self._context.invalidate(start, end - start)
            await self._stop_if_broken()
        finally:
            served.end()

    def serve_blocking(self, requests: Sequence[ReadRequest | WriteRequest]) -> Served:
        """Read and write in the calling thread; each request's `error` says how it went.

        For any thread, and any number of them at a time; only requests in different calls that
        touch the same bytes are in no order.  In one call reads come first.  The caller has to
        invalidate what has moved, and to `end` what this returns then.
        """
        reads = [request for request in requests if isinstance(request, ReadRequest)]
        writes = [request for request in requests if isinstance(request, WriteRequest)]
        if reads:
            self.image.read(reads)
        token = self.image.enter()
        try:
            moved = self._write(writes) if writes else []
        except BaseException:
            self.image.leave(token)
            raise
        return Served(moved, partial(self._end, token, moved, self._moved.stamp))

    def _end(self, token: object, moved: Sequence[tuple[int, int]], stamp: int) -> None:
        self.image.leave(token)
        for offset, length in moved:
            self._settled(offset, offset + length, stamp)

    def _settled(self, start: int, end: int, stamp: int) -> None:
        cluster = self.image.header.cluster_size
        self._moved.settled(start // cluster, -(-end // cluster), stamp)

    async def _stop_if_broken(self) -> None:
        """An image found to be corrupt is not written to: take back what was resolved for that."""
        if self.image.broken is not None and not self._stopped:
            self._stopped = True
            await self._context.invalidate(0, _EVERYTHING)

    async def flush(self) -> None:
        try:
            await self._run(self.image.flush)
        finally:
            with trio.CancelScope(shield=True):
                await self._stop_if_broken()

    async def discard(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            await self._change(extent.offset, extent.length, self._zeroer.discard)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        zero = partial(self._zeroer.zero, may_unmap=may_unmap and self._discard)
        await self._change(offset, length, zero)

    async def _change(self, offset: int, length: int, change: Any) -> None:
        # What is released may still be written to through an answer of `resolve`; it is not used
        # again before the last of those writes has ended.
        token = self.image.enter()
        try:
            with trio.CancelScope(shield=True):
                try:
                    await self._run(change, offset, length)
                finally:
                    await self._invalidate_clusters(offset, offset + length)
                    await self._stop_if_broken()
        finally:
            self.image.leave(token)

    async def _invalidate_clusters(self, start: int, end: int) -> None:
        """For what was changed: the rest of its clusters may have moved along."""
        cluster = self.image.header.cluster_size
        start, end = start - start % cluster, end + -end % cluster
        stamp = self._moved.stamp
        await self._context.invalidate(start, end - start)
        self._settled(start, end, stamp)

    async def resize(self, size: int) -> Geometry:
        old = self.image.size
        if size < old:
            raise Unsupported(
                f"{self.image} can be made smaller only when it is not in use: xbd image resize"
            )
        with trio.CancelScope(shield=True):
            try:
                await self._run(set_size, self.image, self._zeroer, size)
            finally:
                await self._invalidate_clusters(old, size)
        return self.geometry

    async def create_snapshot(self, name: str) -> None:
        await self._run(snapshots.create, self.image, name)

    # -- what lies where ----------------------------------------------------------------------

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        told: Sequence[BlockStatus] = await self._run(self.image.block_status, offset, length)
        return told

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        if self._closed:
            return None
        # More than is asked for: the answer is kept, and this is not asked for every request.
        reach = max(length, SCAN_ENTRIES * self.image.tables.subcluster_size)
        return self.image.resolve_all(offset, reach, for_write=for_write) or None

    def zeroes(self, offset: int, length: int) -> int:
        if self._closed:
            return 0
        reach = max(length, SCAN_ENTRIES * self.image.tables.subcluster_size)
        return self.image.zeroes(offset, min(reach, self.image.size - offset))

    def can_place(self, offset: int, length: int) -> bool:
        if self._placer is None or self._closed:
            return False
        return self._placer.useful(offset, length, self._context.claims())

    async def place(self, extents: Sequence[Extent]) -> None:
        if self._placer is not None:
            moved: list[tuple[int, int]] = []
            try:
                await self._run(self._placer.place, extents, self._context.claims(), moved)
            finally:
                with trio.CancelScope(shield=True):
                    for start, end in _joined(moved):
                        await self._invalidate_clusters(start, end)
                    await self._stop_if_broken()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            if _owner.device is self:
                _owner.device = None
            await self._run(self.image.close)


def _joined(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Start and end of ranges (offset and length) of clusters, neighbours as one."""
    start = end = 0
    for offset, length in sorted(ranges):
        if offset > end:
            if start < end:
                yield start, end
            start = offset
        end = offset + length
    if start < end:
        yield start, end
