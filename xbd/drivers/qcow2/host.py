"""One file of an image on the host: whole transfers, blocking, callable from many threads.

Metadata goes through the page cache, where a write is outside this process at once and survives
its death; `flush` makes it durable.  Data goes past the page cache where the file was opened so.
The two never touch the same page: `open_host` allows direct I/O only for clusters of whole pages.
But packed clusters, which are written as metadata are, may be read either way: the kernel writes a
page out before it is read past the cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from xbd.core.driver import DriverError, NoSpace, OpenFailed
from xbd.core.hostio.failures import io_failure, open_failure, shown
from xbd.core.hostio.files import CACHED, O_DIRECT, DirectAlignment, direct_alignment, open_file
from xbd.core.hostio.locks import lock_file
from xbd.core.hostio.parallel import ParallelIo, Piece
from xbd.core.hostio.transfer import read_full, total, write_full, write_zero_bytes, zero_tail
from xbd.core.hostio.zero import FileSpace, fallocate

PAGE: Final = 4096

_PLENTY: Final = 64
"""Nobody shall lack the space that is allocated ahead: there must be so many times as much."""

_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)
"""Reads what is in the page cache, and nothing else (Linux)."""

_DSYNC: Final[int] = getattr(os, "RWF_DSYNC", 0)
"""Makes one write durable, where `flush` has to wait for all there are (Linux)."""


@attrs.frozen
class Transfer:
    """Bytes to move between buffers and a host file, from file `offset` on."""

    offset: int
    buffers: Sequence[memoryview]


class Host:
    """An open file.  Every method raises `DriverError` for what the host refuses."""

    def __init__(
        self, path: Path, fd: int, cached_fd: int, alignment: DirectAlignment, *, writable: bool
    ) -> None:
        self.path = path
        self.fd = fd
        """For data, and for `resolve`.  Open until `close`."""
        self._cached_fd = cached_fd
        self.alignment = alignment
        self.writable = writable
        self._space = FileSpace(fd, self._write_zero_bytes)
        self._lost = 0
        """Errno of a flush that failed: what was written before may be lost for ever."""
        self._size_lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._flushes_begun = 0
        self.parallel = ParallelIo()
        """For those who move many pieces at a time, of this file or others."""

    @property
    def direct(self) -> bool:
        """Whether data bypasses the page cache."""
        return self.fd != self._cached_fd

    @property
    def metadata_fd(self) -> int:
        """For metadata that others write.  Open until `close`."""
        return self._cached_fd

    def size(self) -> int:
        """Of the file (or of a block device), now."""
        try:
            return os.lseek(self._cached_fd, 0, os.SEEK_END)
        except OSError as error:
            raise self._failure("size of", error) from error

    def most(self) -> int | None:
        """What `grow` can make of it; None: there is no such limit."""
        return None if self._is_regular() else self.size()

    # -- metadata -----------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytearray:
        """Metadata.  Behind the file's end there are zeroes."""
        data = bytearray(length)
        try:
            read_full(self._cached_fd, [memoryview(data)], offset)
        except OSError as error:
            raise self._failure("read", error) from error
        return data

    def read_at_once(self, offset: int, length: int) -> memoryview | None:
        """Any bytes, if all of them are in the page cache.  Never waits."""
        if not _NOWAIT:
            return None
        data = memoryview(bytearray(length))
        try:
            whole = os.preadv(self._cached_fd, [data], offset, _NOWAIT) == length
        except OSError:
            return None  # not there, or something is wrong: reading tells
        return data if whole else None

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Metadata.  On return it survives the death of this process."""
        try:
            write_full(self._cached_fd, [memoryview(data)], offset)
        except OSError as error:
            raise self._failure("write", error) from error

    def write_durably(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Metadata.  On return it is on the disk, whatever else is not yet."""
        if not _DSYNC:
            self.write(offset, data)
            self.flush()
            return
        rest = memoryview(data)
        try:
            while rest:
                done = os.pwritev(self._cached_fd, [rest], offset, _DSYNC)
                offset, rest = offset + done, rest[done:]
        except OSError as error:
            raise self._failure("write", error) from error

    # -- data ---------------------------------------------------------------------------------

    def readv(self, offset: int, buffers: Sequence[memoryview], *, cached: bool = False) -> None:
        """Data.  Behind the file's end there are zeroes."""
        length = total(buffers)
        fd = self._cached_fd if cached else self._fd_for(offset, length)
        try:
            done = read_full(fd, buffers, offset, self._cached_fd)
        except OSError as error:
            raise self._failure("read", error) from error
        if done < length:
            zero_tail(buffers, done)

    def read_transfers(
        self, transfers: Sequence[Transfer], *, cached: bool = False
    ) -> list[DriverError | None]:
        """Data, as `readv`, side by side; `cached`: through the page cache in any case.

        What became of each transfer.
        """
        done = [False] * len(transfers)
        fd = self._cached_fd if cached else self.fd
        if len(transfers) > 1 and (cached or self._can_go_parallel(transfers)):
            done = self.parallel.read([(fd, one.offset, one.buffers) for one in transfers])
        return [
            None if whole else self._read_one(transfer, cached=cached)
            for transfer, whole in zip(transfers, done, strict=True)
        ]

    def _read_one(self, transfer: Transfer, *, cached: bool) -> DriverError | None:
        try:
            self.readv(transfer.offset, transfer.buffers, cached=cached)
        except DriverError as error:
            return error
        return None

    def writev(self, transfers: Sequence[Transfer]) -> list[DriverError | None]:
        """Data.  What became of each transfer; they may be carried out in any order."""
        written = [False] * len(transfers)
        if self.direct and self._can_go_parallel(transfers):
            written = self.parallel.write([(self.fd, one.offset, one.buffers) for one in transfers])
        return [
            None if done else self._writev_one(transfer)
            for transfer, done in zip(transfers, written, strict=True)
        ]

    def copy(self, copies: Sequence[tuple[Piece, Transfer]]) -> list[bool]:
        """Read each piece, of any file, and write the transfer that uses its memory then.  Only if
        data goes past the page cache.

        Whether that was done whole; what was not may have been done in part.
        """
        return self.parallel.copy(
            [(old, (self.fd, new.offset, new.buffers)) for old, new in copies]
        )

    def _can_go_parallel(self, transfers: Sequence[Transfer]) -> bool:
        for transfer in transfers:
            if (transfer.offset | total(transfer.buffers)) % self.alignment.offset:
                return False
            if any(buffer.readonly for buffer in transfer.buffers):
                return False
        return len(transfers) > 1

    def _writev_one(self, transfer: Transfer) -> DriverError | None:
        fd = self._fd_for(transfer.offset, total(transfer.buffers))
        try:
            write_full(fd, transfer.buffers, transfer.offset, self._cached_fd)
        except OSError as error:
            return self._failure("write", error)
        return None

    def _fd_for(self, offset: int, length: int) -> int:
        return self._cached_fd if (offset | length) % self.alignment.offset else self.fd

    def _write_zero_bytes(self, offset: int, length: int) -> None:
        write_zero_bytes(self._fd_for(offset, length), offset, length)

    # -- space and durability -----------------------------------------------------------------

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range inside the file read as zeroes."""
        try:
            self._space.zero(offset, length, may_unmap=may_unmap)
        except OSError as error:
            raise self._failure("write zeroes to", error) from error

    def punch(self, offset: int, length: int) -> None:
        """Give the range's space back, where the filesystem can."""
        try:
            self._space.discard(offset, length)
        except OSError as error:
            raise self._failure("discard in", error) from error

    def grow(self, size: int) -> None:
        """Make the file at least `size` bytes long; what is new reads as zeroes."""
        with self._size_lock:
            there = self.size()
            if there >= size:
                return
            if not self._is_regular():
                raise NoSpace(f"{shown(self.path)} has only {there} bytes: extend it first")
            self.truncate(size)

    def shrink(self, size: int) -> None:
        """Cut the file off; a block device stays as it is."""
        if self._is_regular():
            self.truncate(size)

    def _is_regular(self) -> bool:
        return stat.S_ISREG(os.fstat(self._cached_fd).st_mode)

    def allocate(self, offset: int, length: int) -> None:
        """Have the filesystem find space ahead of writes into a hole, if it can and has plenty.

        Writing is up to twice as fast then.
        """
        with contextlib.suppress(OSError):
            space = os.fstatvfs(self._cached_fd)
            if space.f_bavail * space.f_frsize > _PLENTY * length:
                fallocate(self._cached_fd, 0, offset, length)

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._cached_fd, size)
        except OSError as error:
            raise self._failure(f"resize to {size} bytes", error) from error

    def flush(self) -> None:
        """Make durable all that was written before.

        After a failure the kernel forgets which cached writes were lost, so every later flush
        fails too: nobody may believe that they reached the disk.

        Who comes while another one flushes shares the next flush with all that come meanwhile.
        """
        wanted = self._flushes_begun + 1
        with self._flush_lock:
            if self._lost:
                raise io_failure(f"{shown(self.path)}: earlier writes were lost", self._lost)
            if self._flushes_begun >= wanted:
                return  # it began after this call did, and has ended
            self._flushes_begun += 1
            try:
                os.fdatasync(self._cached_fd)
            except OSError as error:
                self._lost = error.errno or errno.EIO
                raise self._failure("flush", error) from error

    def close(self) -> None:
        """Idempotent; nothing may be in flight any more."""
        self.parallel.close()
        fds = {self.fd, self._cached_fd} - {-1}
        self.fd = self._cached_fd = -1
        for fd in fds:
            os.close(fd)

    def _failure(self, what: str, error: OSError) -> DriverError:
        return io_failure(f"{what} {shown(self.path)}", error.errno or errno.EIO)


def open_host(path: Path, *, writable: bool, direct: bool = False, lock: bool = True) -> Host:
    """Open and lock a file (or block device); `direct`: data past the page cache, if it can.

    Raises `OpenFailed`: EBUSY if another process has a lock in the way.
    """
    fds: list[int] = []
    try:
        cached_fd = open_file(path, writable=writable)
        fds.append(cached_fd)
        if lock:
            lock_file(cached_fd, shown(path), exclusive=writable)
        alignment = None
        if direct and O_DIRECT:
            alignment = _open_direct(path, cached_fd, fds, writable=writable)
        if alignment is None:
            alignment = CACHED
        return Host(path, fds[-1], cached_fd, alignment, writable=writable)
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise open_failure(
                f"cannot open {shown(path)} for {'writing' if writable else 'reading'}",
                error.errno or errno.EIO,
            ) from error
        raise


def _open_direct(
    path: Path, cached_fd: int, fds: list[int], *, writable: bool
) -> DirectAlignment | None:
    """Put a descriptor with O_DIRECT on `fds`; None: the file has no such thing."""
    try:
        fd = open_file(path, writable=writable, flags=O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    fds.append(fd)
    if not os.path.samestat(os.fstat(fd), os.fstat(cached_fd)):
        raise OpenFailed(
            f"{shown(path)} was replaced while it was being opened", errno=errno.ESTALE
        )
    alignment = direct_alignment(fd)
    if alignment is None or alignment.offset > PAGE:
        os.close(fds.pop())
        return None
    return alignment
