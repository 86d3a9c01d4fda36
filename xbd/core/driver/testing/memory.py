"""A disk in memory: the reference model, a double in tests, and a judge of the core's promises."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from xbd.core.driver.api import (
    API_VERSION,
    BlockDevice,
    BlockStatus,
    Capability,
    Concurrency,
    DriverDescriptor,
    Extent,
    Geometry,
    HostExtent,
    OpenContext,
)
from xbd.core.driver.buffers import is_aligned, total
from xbd.core.driver.geometry import request_unit
from xbd.core.driver.options import boolean, option, positive_int, size, text
from xbd.core.errors import NoSpace
from xbd.core.hostio.holes import data_runs
from xbd.core.units import MIB

ALL_CAPABILITIES: Final = (
    Capability.WRITE
    | Capability.FLUSH
    | Capability.DISCARD
    | Capability.WRITE_ZEROES
    | Capability.RESIZE
    | Capability.SNAPSHOT
)
_SPACE_UNIT: Final = 4096
_IOV_MAX: Final = 1024


class MemoryDisk:
    """The content of a disk, which outlives the devices that are opened on it."""

    def __init__(self, size: int) -> None:
        self.fd = _anonymous_file()
        os.ftruncate(self.fd, size)
        self.snapshots: list[tuple[str, bytes]] = []
        """Names and contents."""

    def __del__(self) -> None:
        os.close(self.fd)

    @property
    def size(self) -> int:
        """In bytes."""
        return os.fstat(self.fd).st_size

    @property
    def content(self) -> bytes:
        """All of it, read past any device."""
        return os.pread(self.fd, self.size, 0)


class MemoryDevice(BlockDevice):
    """A `MemoryDisk` as a device.

    Every call checks what the core guarantees to drivers and raises `AssertionError` otherwise,
    and passes a checkpoint before it touches anything.  `space` bounds the bytes (in units of
    4096) that can be written before `NoSpace`; None: no bound.
    """

    def __init__(
        self,
        disk: MemoryDisk | int,
        *,
        geometry: Geometry | None = None,
        capabilities: Capability = ALL_CAPABILITIES,
        writable: bool = True,
        resolvable: bool = True,
        space: int | None = None,
    ) -> None:
        self.disk = disk if isinstance(disk, MemoryDisk) else MemoryDisk(disk)
        self.closed = False
        self._geometry = attrs.evolve(geometry or Geometry(size=0), size=self.disk.size)
        self._capabilities = capabilities if writable else capabilities & Capability.FLUSH
        self._resolvable = resolvable
        self._space = space
        self._used: set[int] = set()
        self._fd = _reopen(self.disk.fd, writable=writable)

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def capabilities(self) -> Capability:
        return self._capabilities

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._begin(Capability.NONE, offset, total(buffers), buffers)
        for at, part in _batches(offset, buffers):
            assert os.preadv(self._fd, part, at) == total(part)

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._begin(Capability.WRITE, offset, total(buffers), buffers)
        self._allocate(offset, total(buffers))
        for at, part in _batches(offset, buffers):
            assert os.pwritev(self._fd, part, at) == total(part)

    async def flush(self) -> None:
        await self._begin(Capability.FLUSH, 0, 0)

    async def discard(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            await self._begin(Capability.DISCARD, extent.offset, extent.length)
            # Undefined content: what nobody can rely on is best anything but zeroes.
            os.pwrite(self._fd, b"\xdd" * extent.length, extent.offset)
            self._free(extent.offset, extent.length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        await self._begin(Capability.WRITE_ZEROES, offset, length)
        if may_unmap:
            self._free(offset, length)
        else:
            self._allocate(offset, length)
        os.pwrite(self._fd, bytes(length), offset)

    async def resize(self, size: int) -> Geometry:
        await self._begin(Capability.RESIZE, 0, 0)
        os.ftruncate(self._fd, size)
        self._geometry = attrs.evolve(self._geometry, size=size)
        return self._geometry

    async def create_snapshot(self, name: str) -> None:
        await self._begin(Capability.SNAPSHOT, 0, 0)
        self.disk.snapshots.append((name, self.disk.content))

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        await self._begin(Capability.NONE, offset, length)
        return [
            BlockStatus(length=size, hole=not data, zero=not data)
            for size, data in data_runs(self._fd, offset, length)
        ]

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        bounded = for_write and self._space is not None
        if self.closed or not self._resolvable or bounded:
            return None
        if for_write and Capability.WRITE not in self._capabilities:
            return None
        return [HostExtent(fd=self._fd, offset=offset, length=self._geometry.size - offset)]

    async def aclose(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._fd)

    async def _begin(
        self,
        needs: Capability,
        offset: int,
        length: int,
        buffers: Sequence[memoryview] = (),
    ) -> None:
        assert not self.closed, "called after aclose"
        assert needs in self._capabilities, f"called without {needs}"
        end, unit = offset + length, request_unit(self._geometry)
        assert 0 <= offset <= end <= self._geometry.size, "range outside the disk"
        assert not offset % unit, "offset not aligned"
        assert not end % unit or end == self._geometry.size, "length not aligned"
        if buffers:
            assert length <= self._geometry.max_transfer, "longer than max_transfer"
            if end % unit == 0:
                alignment = self._geometry.memory_alignment
                assert is_aligned(buffers, alignment), "buffers not aligned"
        await trio.lowlevel.checkpoint()

    def _allocate(self, offset: int, length: int) -> None:
        if self._space is None:
            return
        used = self._used.union(range(offset // _SPACE_UNIT, -(-(offset + length) // _SPACE_UNIT)))
        if len(used) * _SPACE_UNIT > self._space:
            raise NoSpace(f"only {self._space} bytes can be written to this memory disk")
        self._used = used

    def _free(self, offset: int, length: int) -> None:
        end = (offset + length) // _SPACE_UNIT
        self._used.difference_update(range(-(-offset // _SPACE_UNIT), end))


@attrs.frozen(kw_only=True)
class MemoryOptions:
    """Options of the memory driver."""

    path: str = option(text, help="any name; opening it again gives the same disk")
    size: int = option(size, default=16 * MIB, help="bytes, when the disk is first opened")
    block: int = option(positive_int, default=512, help="logical block in bytes")
    resolve: bool = option(boolean, default=True, help="let the core do the I/O where it can")


def memory_driver() -> DriverDescriptor[MemoryOptions]:
    """A driver whose disks live as long as it does, by name."""
    disks: dict[str, MemoryDisk] = {}

    @asynccontextmanager
    async def open_memory(
        context: OpenContext, options: MemoryOptions
    ) -> AsyncIterator[MemoryDevice]:
        disk = disks.get(options.path)
        if disk is None:
            disk = disks[options.path] = MemoryDisk(options.size)
        device = MemoryDevice(
            disk,
            geometry=Geometry(
                size=disk.size, logical_block=options.block, physical_block=options.block
            ),
            writable=context.writable,
            resolvable=options.resolve,
        )
        try:
            yield device
        finally:
            await device.aclose()

    return DriverDescriptor(
        name="memory",
        summary="disks in the daemon's memory, for tests",
        api_version=API_VERSION,
        options=MemoryOptions,
        concurrency=Concurrency.PARALLEL,
        capabilities=ALL_CAPABILITIES,
        open=open_memory,
    )


MEMORY: Final = memory_driver()
"""Needs no entry point: ``open_with(MEMORY, DiskSpec.parse("memory:name"), ...)``."""


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("xbd-memory-disk", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())


def _reopen(fd: int, *, writable: bool) -> int:
    """An fd of its own, with rights of its own where the system can do that."""
    try:
        return os.open(
            f"/proc/self/fd/{fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        )
    except FileNotFoundError:
        return os.dup(fd)


def _batches(
    offset: int, buffers: Sequence[memoryview]
) -> Iterator[tuple[int, Sequence[memoryview]]]:
    """What one preadv or pwritev can take at a time."""
    for first in range(0, len(buffers), _IOV_MAX):
        part = buffers[first : first + _IOV_MAX]
        yield offset, part
        offset += total(part)
