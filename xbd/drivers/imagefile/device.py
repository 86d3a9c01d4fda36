"""Opening and resizing a flat image file.

The disk is as long as the file.  Bytes at the end that are no whole sector are not part of it, as
with vnd(4) and loop devices; they are kept, and a warning tells of them.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractAsyncContextManager
from functools import partial

import attrs

from xbd.core.driver import BlockDevice, Capability, Geometry, OpenContext, OpenFailed
from xbd.core.hostio.failures import describe, io_failure, shown
from xbd.core.hostio.files import kind_of, open_file, size_of, stat_path
from xbd.core.hostio.hostfile import HostFile
from xbd.core.hostio.zero import FileSpace
from xbd.drivers._hostdisk import HostDisk, open_locked, opened, whole_sectors
from xbd.drivers.imagefile.options import ImagefileOptions

_PAGE = 4096


def open_imagefile(
    context: OpenContext, options: ImagefileOptions
) -> AbstractAsyncContextManager[BlockDevice]:
    """Open an image; raises `OpenFailed`."""
    return opened(context, partial(_open, context, options))


def _open(context: OpenContext, options: ImagefileOptions) -> HostDisk:
    require = partial(_require_regular, options)
    require(stat_path(options.path, _MISSING))
    return open_locked(context, options, open_file, require, partial(_disk, context, options))


_MISSING = "create it first, for example with: truncate -s 10G FILE"


def _require_regular(options: ImagefileOptions, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    path = shown(options.path)
    text = f"{path} is a {kind_of(status)}, not an image file"
    if stat.S_ISBLK(status.st_mode):
        raise OpenFailed(f"{text}: use raw:{path}", errno=errno.ENOTBLK)
    number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
    raise OpenFailed(f"{text}: {describe(number)}", errno=number)


def _disk(context: OpenContext, options: ImagefileOptions, file: HostFile) -> HostDisk:
    sector = int(options.sector_size)
    file_size = size_of(file.fd)
    space = FileSpace(file.fd, file.write_zero_bytes)
    capabilities = Capability.NONE
    if context.writable:
        capabilities |= Capability.WRITE | Capability.FLUSH
        capabilities |= Capability.WRITE_ZEROES | Capability.RESIZE
        if options.discard == "unmap" and space.can_discard(file_size):
            capabilities |= Capability.DISCARD
    block = _filesystem_block(file.fd)
    geometry = Geometry(
        size=whole_sectors(context, file, file_size, sector),
        logical_block=sector,
        physical_block=max(sector, file.alignment.offset, min(block, _PAGE)),
        request_alignment=file.alignment.offset,
        memory_alignment=file.alignment.memory,
        discard_granularity=max(sector, block),
    )
    return ImageDisk(
        file, space, geometry, capabilities, may_unmap=Capability.DISCARD in capabilities
    )


def _filesystem_block(fd: int) -> int:
    """In bytes; what network filesystems report is often a transfer size and says nothing."""
    block = os.fstatvfs(fd).f_frsize
    return block if 512 <= block <= 65536 and not block & (block - 1) else _PAGE


class ImageDisk(HostDisk):
    """An open image file."""

    async def resize(self, size: int) -> Geometry:
        """Make the disk the file's first `size` bytes.

        The file is cut off or extended by a hole; a file that somebody made longer already stays
        as it is when the disk grows into it.
        """
        try:
            await self.file.run_blocking(self._fit_file, size)
        except OSError as error:
            raise io_failure(
                f"resize {shown(self.file.path)} to {size} bytes", error.errno or errno.EIO
            ) from error
        self._geometry = attrs.evolve(self._geometry, size=size)
        return self._geometry

    def _fit_file(self, size: int) -> None:
        if size < self._geometry.size or size > size_of(self.file.fd):
            os.ftruncate(self.file.fd, size)
