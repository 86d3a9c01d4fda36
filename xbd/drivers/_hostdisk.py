"""What the drivers for image files and for host block devices have in common."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

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
)
from xbd.core.hostio.failures import shown
from xbd.core.hostio.hostfile import HostFile, open_host_file
from xbd.core.hostio.locks import lock_file, while_busy
from xbd.core.hostio.zero import Space

_LOG = logging.getLogger(__name__)


class HostOptions(Protocol):
    """The options that say how a host file is opened."""

    @property
    def path(self) -> Path: ...
    @property
    def cache(self) -> str | None: ...
    @property
    def locking(self) -> bool: ...


def open_locked(
    context: OpenContext,
    options: HostOptions,
    opener: Callable[..., int],
    require: Callable[[os.stat_result], None],
    make: Callable[[HostFile], HostDisk],
) -> HostDisk:
    """Open by ``opener(path, writable=, flags=)``, look what it is, lock it, `make` a disk of it.

    `require` raises if the file is not of the driver's kind.  Raises `OpenFailed`; nothing stays
    open then.
    """
    path = options.path
    file = open_host_file(
        path,
        lambda flags: opener(path, writable=context.writable, flags=flags),
        name=context.device_id,
        writable=context.writable,
        cache=options.cache,
        run_blocking=context.run_blocking,
    )
    try:
        require(os.fstat(file.fd))
        if options.locking:
            lock_file(file.fd, shown(path), exclusive=context.writable)
        return make(file)
    except BaseException:
        file.close()
        raise


class HostDisk(BlockDevice):
    """A disk whose bytes lie in a host file one after the other, from its beginning on."""

    def __init__(
        self,
        file: HostFile,
        space: Space,
        geometry: Geometry,
        capabilities: Capability,
        *,
        may_unmap: bool,
    ) -> None:
        """`may_unmap`: zeroes may free space, if the guest's request allows it."""
        self.file = file
        self._space = space
        self._geometry = geometry
        self._capabilities = capabilities
        self._may_unmap = may_unmap

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def capabilities(self) -> Capability:
        return self._capabilities

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self.file.readv(offset, buffers)

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self.file.writev(offset, buffers)

    async def flush(self) -> None:
        await self.file.flush()

    async def discard(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            await self.file.discard(self._space, extent.offset, extent.length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        may_unmap = may_unmap and self._may_unmap
        await self.file.write_zeroes(self._space, offset, length, may_unmap=may_unmap)

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        """The file's holes, where its filesystem tells of them."""
        runs = await self.file.data_runs(offset, length)
        return [BlockStatus(length=size, hole=not data, zero=not data) for size, data in runs]

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        """The disk from `offset` to its end."""
        rest = self._geometry.size - offset
        if rest <= 0 or (for_write and Capability.WRITE not in self._capabilities):
            return None
        return (HostExtent(fd=self.file.fd, offset=offset, length=rest),)

    async def aclose(self) -> None:
        await self.file.aclose()


@asynccontextmanager
async def opened(
    context: OpenContext, open_blocking: Callable[[], HostDisk]
) -> AsyncIterator[HostDisk]:
    """The disk that `open_blocking` opens in a thread, closed at the end.

    What is busy is tried again for a moment: the kernel may still be finishing requests of a
    daemon that was killed, and keeps its lock until then.
    """
    disk: HostDisk = await while_busy(partial(context.run_blocking, open_blocking))
    try:
        yield disk
    finally:
        with trio.CancelScope(shield=True):
            await disk.aclose()


def whole_sectors(context: OpenContext, file: HostFile, size: int, sector: int) -> int:
    """How many of `size` bytes the disk has; what is no whole sector at the end is left alone."""
    rest = size % sector
    if size == rest:
        raise OpenFailed(
            f"{shown(file.path)} has {size} bytes, less than one sector of {sector}: give it a "
            "size first",
            errno=errno.EINVAL,
        )
    if rest:
        _LOG.warning(
            "%s: the last %d bytes of %s are no whole sector of %d bytes; the disk ends before"
            " them and they stay as they are",
            context.device_id,
            rest,
            shown(file.path),
            sector,
        )
    return size - rest
