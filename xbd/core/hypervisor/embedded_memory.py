"""A guest's memory as the embedded host sees it: pages, who may touch them, and mapping them.

The guest can change both at any time; only their size is nailed down, by F_SEAL_SHRINK, without
which a guest could cut its memory off and so kill the daemon with SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from typing import Final

import cffi

from xbd.core.hypervisor.base import NativeDomain
from xbd.core.hypervisor.embedded_wire import (
    BACKEND_DOMID,
    GRANT_ENTRY_SIZE,
    WireError,
    grant_entry,
)
from xbd.core.hypervisor.gntst import GrantStatus
from xbd.core.units import PAGE_SIZE, GrantRef

_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED: Final = 0x10  # Linux, on every architecture that runs Xen
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_GRANTED: Final = grant_entry(BACKEND_DOMID, readonly=False)
_GRANTED_READONLY: Final = grant_entry(BACKEND_DOMID, readonly=True)

_ffi: Final = cffi.FFI()
_libc_mmap: Final = ctypes.CDLL(None, use_errno=True).mmap
_libc_mmap.restype = ctypes.c_void_p
_libc_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]


def address_of(view: memoryview) -> int:
    """The virtual address of a view's first byte, read-only views included."""
    return int(_ffi.cast("uintptr_t", _ffi.from_buffer(view)))


def _require_memfd(fd: int, size: int, what: str) -> None:
    """Accept only memory that can never become shorter than `size` bytes."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise WireError(errno.EINVAL, f"the {what} is not a memfd") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or os.fstatvfs(fd).f_bsize != PAGE_SIZE:
        # A page fault on huge pages can fail, and failing means SIGBUS here.
        raise WireError(errno.EINVAL, f"the {what} must be a memfd without huge pages")
    if not seals & fcntl.F_SEAL_SHRINK:
        raise WireError(errno.EPERM, f"the {what} is not sealed against shrinking (F_SEAL_SHRINK)")
    if status.st_size < size:
        raise WireError(errno.EINVAL, f"the {what} has {status.st_size} bytes, {size} are needed")


class GuestMemory:
    """The RAM and the grant table that one guest handed over."""

    def __init__(self, ram_fd: int, table_fd: int, pages: int) -> None:
        """Map both; the descriptors stay the caller's.  Raises `WireError`."""
        size = pages * PAGE_SIZE
        _require_memfd(ram_fd, size, "memory")
        _require_memfd(table_fd, pages * GRANT_ENTRY_SIZE, "grant table")
        self.pages = pages
        try:
            table = mmap.mmap(table_fd, pages * GRANT_ENTRY_SIZE, prot=mmap.PROT_READ)
            read_write = mmap.mmap(ram_fd, size, prot=_READ_WRITE)
            read_only = mmap.mmap(ram_fd, size, prot=mmap.PROT_READ)
            self._fd = os.dup(ram_fd)
        except OSError as error:
            number = error.errno or errno.EIO
            raise WireError(number, f"mapping the memory failed: {error.strerror}") from error
        self._table = memoryview(table).cast("Q")
        self._maps: tuple[mmap.mmap, ...] = (table, read_write, read_only)
        # Views keep their mmap alive: memory goes only when the last mapping of it has gone.
        self._writable = memoryview(read_write)
        self._readable = memoryview(read_only)
        self._writable_address = address_of(self._writable)
        self._readable_address = address_of(self._readable)

    def close(self) -> None:
        """Let go of the memory.  What is mapped stays valid until it is unmapped."""
        os.close(self._fd)
        self._maps = ()
        self._table.release()
        self._writable.release()
        self._readable.release()

    def native(self) -> NativeDomain:
        """All of it for native code; it stays mapped until that is closed."""
        kept = [self._maps]
        return NativeDomain(
            writable=self._writable_address,
            readable=self._readable_address,
            table=address_of(self._table),
            pages=self.pages,
            granted=_GRANTED,
            granted_readonly=_GRANTED_READONLY,
            close=kept.clear,
        )

    def check(self, ref: GrantRef, *, writable: bool) -> GrantStatus:
        """Whether the guest grants this page to us now.  Reads the guest's table once."""
        if not 0 <= ref < self.pages:
            return GrantStatus.BAD_GNTREF
        entry = self._table[ref]
        if entry == _GRANTED or (entry == _GRANTED_READONLY and not writable):
            return GrantStatus.OKAY
        return GrantStatus.GENERAL_ERROR

    def first_refused(self, refs: Sequence[GrantRef], *, writable: bool) -> GrantRef | None:
        """The first of these pages that `check` does not find okay; one look at each."""
        table, pages = self._table, self.pages
        for ref in refs:
            if not 0 <= ref < pages:
                return ref
            entry = table[ref]
            if entry != _GRANTED and (writable or entry != _GRANTED_READONLY):
                return ref
        return None

    def run(self, first: GrantRef, pages: int, *, writable: bool) -> tuple[memoryview, int]:
        """Pages that lie side by side in the guest, and their address.  No system call."""
        start, end = first * PAGE_SIZE, (first + pages) * PAGE_SIZE
        if writable:
            return self._writable[start:end], self._writable_address + start
        return self._readable[start:end], self._readable_address + start

    def scattered(self, refs: Sequence[GrantRef], *, writable: bool) -> tuple[memoryview, int]:
        """Pages from anywhere in the guest, placed side by side.  Raises OSError."""
        area = mmap.mmap(
            -1,
            len(refs) * PAGE_SIZE,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            prot=_READ_WRITE,
        )
        view = memoryview(area)
        address = address_of(view)
        prot = _READ_WRITE if writable else mmap.PROT_READ
        for position, first, pages in runs(refs):
            where = address + position * PAGE_SIZE
            self._overlay(where, first * PAGE_SIZE, pages * PAGE_SIZE, prot)
        return (view if writable else view.toreadonly()), address

    def _overlay(self, address: int, offset: int, length: int, prot: int) -> None:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if _libc_mmap(address, length, prot, flags, self._fd, offset) == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def contiguous(refs: Sequence[GrantRef]) -> bool:
    """Whether these pages lie side by side in the guest already."""
    first, pages = refs[0], len(refs)
    return pages == 1 or list(refs) == list(range(first, first + pages))


def runs(refs: Sequence[GrantRef]) -> list[tuple[int, GrantRef, int]]:
    """Split into stretches of neighbours: (position in `refs`, first page, number of pages)."""
    found: list[tuple[int, GrantRef, int]] = []
    start = 0
    for index in range(1, len(refs) + 1):
        if index == len(refs) or refs[index] != refs[start] + index - start:
            found.append((start, refs[start], index - start))
            start = index
    return found
