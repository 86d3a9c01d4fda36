"""Opening and resizing a host block device."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial

import attrs

from xbd.core.driver import BlockDevice, Capability, DriverError, Geometry, OpenContext, OpenFailed
from xbd.core.hostio.blockdev import (
    BlockLimits,
    DeviceSpace,
    open_exclusive,
    read_limits,
    size_of_device,
)
from xbd.core.hostio.failures import io_failure, open_failure, shown
from xbd.core.hostio.files import kind_of, open_file, stat_path
from xbd.core.hostio.hostfile import HostFile
from xbd.drivers._hostdisk import HostDisk, open_locked, opened, whole_sectors
from xbd.drivers.raw.options import RawOptions


def open_raw(context: OpenContext, options: RawOptions) -> AbstractAsyncContextManager[BlockDevice]:
    """Open a block device; raises `OpenFailed`."""
    return opened(context, partial(_open, context, options))


def _open(context: OpenContext, options: RawOptions) -> HostDisk:
    require = partial(_require_device, options)
    require(stat_path(options.path))
    exclusive = options.locking and context.writable
    opener = open_exclusive if exclusive else open_file
    with _unclaimed(context, options):
        return open_locked(context, options, opener, require, partial(_disk, context, options))


@contextmanager
def _unclaimed(context: OpenContext, options: RawOptions) -> Iterator[None]:
    """For readers: claim the device for a moment, to learn whether a mount or a writer has it.

    They don't keep the claim, because several guests may read the same device.
    """
    if context.writable or not options.locking:
        yield
        return
    try:
        claim = open_exclusive(options.path, writable=False)
    except OSError as error:
        raise open_failure(
            f"cannot open {shown(options.path)} for reading", error.errno or errno.EIO
        ) from error
    try:
        yield
    finally:
        os.close(claim)


def _require_device(options: RawOptions, status: os.stat_result) -> None:
    if stat.S_ISBLK(status.st_mode):
        return
    path = shown(options.path)
    text = f"{path} is a {kind_of(status)}, not a block device"
    if stat.S_ISREG(status.st_mode):
        text += f": use imagefile:{path}, or the driver of the image's format"
    raise OpenFailed(text, errno=errno.ENOTBLK)


def _disk(context: OpenContext, options: RawOptions, file: HostFile) -> HostDisk:
    limits = read_limits(file.fd)
    if context.writable and limits.read_only:
        raise open_failure(
            f"{shown(file.path)} is a read-only device", errno.EROFS, "attach it read-only"
        )
    sector = int(options.sector_size or limits.logical_block)
    space = DeviceSpace(file.fd, limits.logical_block, file.write_zero_bytes)
    unmap = options.discard == "unmap" and limits.discard_max > 0
    geometry = Geometry(
        size=whole_sectors(context, file, limits.size, sector),
        logical_block=sector,
        physical_block=max(sector, limits.physical_block),
        request_alignment=file.alignment.offset,
        memory_alignment=file.alignment.memory,
        **_discard_limits(limits, sector),
    )
    return RawDisk(file, space, geometry, _capabilities(context, unmap=unmap), may_unmap=unmap)


def _capabilities(context: OpenContext, *, unmap: bool) -> Capability:
    if not context.writable:
        return Capability.NONE
    capabilities = Capability.WRITE | Capability.FLUSH
    capabilities |= Capability.WRITE_ZEROES | Capability.RESIZE
    return capabilities | Capability.DISCARD if unmap else capabilities


def _discard_limits(limits: BlockLimits, sector: int) -> dict[str, int]:
    granularity = max(limits.discard_granularity, sector)
    # A partition's start may lie anywhere in one of the disk's discard blocks.
    return {
        "discard_granularity": granularity,
        "discard_alignment": limits.discard_alignment % granularity,
    }


class RawDisk(HostDisk):
    """An open block device."""

    async def resize(self, size: int) -> Geometry:
        """Show the guest the device's first `size` bytes; the device itself stays as it is."""
        try:
            there = await self.file.run_blocking(size_of_device, self.file.fd)
        except OSError as error:
            raise io_failure(
                f"size of {shown(self.file.path)}", error.errno or errno.EIO
            ) from error
        if size > there:
            raise DriverError(
                f"{shown(self.file.path)} has {there} bytes, not {size}: extend the device first",
                errno=errno.ENOSPC,
            )
        self._geometry = attrs.evolve(self._geometry, size=size)
        return self._geometry
