"""An open image file or block device: whole transfers in threads, for the drivers' slow paths."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs

from xbd.core.errors import DriverError, MediaError, OpenFailed, Unsupported
from xbd.core.hostio.failures import io_failure, open_failure, shown
from xbd.core.hostio.files import (
    CACHED,
    O_DIRECT,
    DirectAlignment,
    direct_alignment,
    open_again,
)
from xbd.core.hostio.holes import data_runs
from xbd.core.hostio.transfer import read_full, total, write_full, write_zero_bytes
from xbd.core.hostio.zero import Space
from xbd.core.units import GIB

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

_PIECE: Final = GIB
"""Longest range given to the kernel in one call: between pieces a cancellation can act."""

CACHE_NONE: Final = "none"
CACHE_WRITEBACK: Final = "writeback"


@attrs.define(eq=False)
class HostFile:
    """A file open for a disk, by one or two descriptors.

    With direct I/O, `fd` has O_DIRECT, and what is not aligned for it goes through `cached_fd`
    and the page cache: there the kernel reads, changes and writes the blocks concerned, under
    its own locks, and keeps both ways coherent.  Without, both are the same descriptor.
    """

    path: Path
    fd: int
    """For `resolve`.  Stays open until `aclose`."""
    cached_fd: int
    alignment: DirectAlignment
    run_blocking: Callable[..., Awaitable[Any]]
    _flush_failure: int = 0
    """Errno of a flush that failed through the page cache."""

    @property
    def direct(self) -> bool:
        """Whether `fd` bypasses the page cache."""
        return self.fd != self.cached_fd

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers; `MediaError` if the file ends before."""
        length = total(buffers)
        done = await self._call("read", read_full, *self._way(offset, buffers, length))
        if done < length:
            raise MediaError(
                f"{shown(self.path)} ends at byte {offset + done}: cut off while in use"
            )

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all buffers."""
        await self._call("write", write_full, *self._way(offset, buffers, total(buffers)))

    def _way(
        self, offset: int, buffers: Sequence[memoryview], length: int
    ) -> tuple[int, Sequence[memoryview], int, int]:
        return self._fd_for(offset, length), buffers, offset, self.cached_fd

    def _fd_for(self, offset: int, length: int) -> int:
        return self.cached_fd if (offset | length) % self.alignment.offset else self.fd

    def write_zero_bytes(self, offset: int, length: int) -> None:
        """Write zeroes.  Blocking: for `Space`."""
        write_zero_bytes(self._fd_for(offset, length), offset, length)

    async def flush(self) -> None:
        """fdatasync.

        After a failure the kernel forgets which cached writes were lost, so with the page cache
        every later flush fails too: nobody may believe that they reached the disk.
        """
        if self._flush_failure:
            raise io_failure(f"{shown(self.path)}: earlier writes were lost", self._flush_failure)
        try:
            await self._call("flush", os.fdatasync, self.fd)
        except DriverError as error:
            if not self.direct:
                self._flush_failure = error.errno
            raise

    async def discard(self, space: Space, offset: int, length: int) -> None:
        """Drop the content of a range; `Unsupported` where that can't be done."""
        for start, size in _pieces(offset, length):
            if not await self._call("discard", space.discard, start, size):
                raise Unsupported(f"{shown(self.path)} cannot discard")

    async def write_zeroes(
        self, space: Space, offset: int, length: int, *, may_unmap: bool
    ) -> None:
        """Make a range read as zeroes."""

        def zero(start: int, size: int) -> None:
            space.zero(start, size, may_unmap=may_unmap)

        for start, size in _pieces(offset, length):
            await self._call("write zeroes", zero, start, size)

    async def data_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Where there is data and where holes: see `holes.data_runs`."""
        return await self._call("look for holes in", data_runs, self.fd, offset, length)

    async def _call(self, what: str, function: Callable[..., T], *args: Any) -> T:
        try:
            result: T = await self.run_blocking(function, *args)
        except OSError as error:
            raise io_failure(f"{what} {shown(self.path)}", error.errno or errno.EIO) from error
        return result

    async def aclose(self) -> None:
        """Close the descriptors.  Idempotent; nothing may be in flight any more."""
        if self.fd >= 0:
            await self.run_blocking(self.close)

    def close(self) -> None:
        """As `aclose`, blocking."""
        fds = {self.fd, self.cached_fd} - {-1}
        self.fd = self.cached_fd = -1
        for fd in fds:
            os.close(fd)


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    for start in range(offset, offset + length, _PIECE):
        yield start, min(_PIECE, offset + length - start)


def open_host_file(
    path: Path,
    opener: Callable[[int], int],
    *,
    name: str,
    writable: bool,
    cache: str | None,
    run_blocking: Callable[..., Awaitable[Any]],
) -> HostFile:
    """Open `path` by ``opener(flags)`` and set up its two ways.  Blocking.

    `cache`: ``none`` demands O_DIRECT, ``writeback`` the page cache, None takes O_DIRECT where
    the filesystem has it and otherwise the page cache, with a warning for the disk `name`.
    Raises `OpenFailed`.
    """
    try:
        fd, alignment = _open_data_fd(path, opener, name, cache)
    except OSError as error:
        raise open_failure(
            f"cannot open {shown(path)} for {'writing' if writable else 'reading'}",
            error.errno or errno.EIO,
            _ADVICE.get((error.errno or 0, writable), ""),
        ) from error
    try:
        cached_fd = fd if alignment is CACHED else open_again(path, fd, writable=writable)
    except OSError as error:
        os.close(fd)
        raise open_failure(f"cannot open {shown(path)} again", error.errno or errno.EIO) from error
    except OpenFailed:
        os.close(fd)
        raise
    return HostFile(path, fd, cached_fd, alignment, run_blocking)


_ADVICE: Final = {
    (number, True): "let the daemon write there, or attach the disk read-only"
    for number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)
} | {(errno.EACCES, False): "let the daemon read there"}


def _open_data_fd(
    path: Path, opener: Callable[[int], int], name: str, cache: str | None
) -> tuple[int, DirectAlignment]:
    if cache != CACHE_WRITEBACK:
        fd, alignment = _open_direct(opener)
        if alignment is not None:
            return fd, alignment
        if cache == CACHE_NONE:
            raise OpenFailed(
                f"the filesystem of {shown(path)} has no direct I/O: set cache=writeback",
                errno=errno.EINVAL,
            )
        _LOG.warning(
            "%s: the filesystem of %s has no direct I/O, so the page cache is used"
            " (as with cache=writeback)",
            name,
            shown(path),
        )
    return opener(0), CACHED


def _open_direct(opener: Callable[[int], int]) -> tuple[int, DirectAlignment | None]:
    try:
        fd = opener(O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1, None
    alignment = None
    try:
        alignment = direct_alignment(fd)
    finally:
        if alignment is None:
            os.close(fd)
    return fd, alignment
