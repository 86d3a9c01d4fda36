"""Opening host files: what a path is, O_DIRECT and its alignment, sizes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import struct
from pathlib import Path
from typing import Any, Final

import attrs

from xbd.core.errors import OpenFailed
from xbd.core.hostio.failures import open_failure, shown

O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
_BASE_FLAGS: Final = os.O_CLOEXEC | os.O_NOCTTY

# statx(2): the mask bit, and where the answer lies in struct statx (include/uapi/linux/stat.h).
_STATX_DIOALIGN: Final = 0x2000
_AT_EMPTY_PATH: Final = 0x1000
_STATX_SIZE: Final = 256
_STATX_MASK_AT: Final = 0
_STATX_DIO_AT: Final = 152


@attrs.frozen(kw_only=True)
class DirectAlignment:
    """What direct I/O demands, in bytes; powers of two."""

    offset: int
    """For file offsets and for the length of a whole transfer."""
    memory: int
    """For the address and length of each buffer."""


CACHED: Final = DirectAlignment(offset=1, memory=1)
"""Through the page cache everything goes."""


def stat_path(path: Path, if_missing: str = "") -> os.stat_result:
    """Follows links; raises `OpenFailed` if there is nothing (with the advice `if_missing`) or
    it may not be looked at."""
    try:
        return path.stat()
    except OSError as error:
        advice = if_missing if error.errno == errno.ENOENT else ""
        raise open_failure(f"cannot open {shown(path)}", error.errno or errno.EIO, advice) from None


def kind_of(status: os.stat_result) -> str:
    """What a path names, in words: ``regular file``, ``block device``, ``directory``..."""
    kinds = {
        stat.S_IFREG: "regular file",
        stat.S_IFBLK: "block device",
        stat.S_IFDIR: "directory",
        stat.S_IFCHR: "character device",
        stat.S_IFIFO: "named pipe",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(status.st_mode), "special file")


def open_file(path: Path, *, writable: bool, flags: int = 0) -> int:
    """Open an existing file; the fd is the caller's.  Raises OSError as open(2) does.

    Not for pipes or terminals: opening one of those can wait for ever.
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    return os.open(path, access | _BASE_FLAGS | flags)


def open_again(path: Path, fd: int, *, writable: bool, flags: int = 0) -> int:
    """Open the file of `fd` once more by its path; `OpenFailed` if it is another one by now."""
    again = open_file(path, writable=writable, flags=flags)
    if os.path.samestat(os.fstat(fd), os.fstat(again)):
        return again
    os.close(again)
    raise OpenFailed(f"{shown(path)} was replaced while it was being opened", errno=errno.ESTALE)


def size_of(fd: int) -> int:
    """Bytes in a regular file or on a block device, now."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    return os.lseek(fd, 0, os.SEEK_END)


def direct_alignment(fd: int) -> DirectAlignment | None:
    """What O_DIRECT demands of the file open as `fd` (with O_DIRECT); None: it can't do it.

    Asks statx (Linux 6.1), and where the kernel or the filesystem does not say, tries.
    """
    told = _statx_alignment(fd)
    if told is None:
        return _tried_alignment(fd)
    return told if told.offset else None


def _statx_function() -> Any:
    function = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if function is not None:
        function.argtypes = (
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_char_p,
        )
    return function


_statx: Final = _statx_function()


def _statx_alignment(fd: int) -> DirectAlignment | None:
    if _statx is None:
        return None
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if _statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return None
    (mask,) = struct.unpack_from("I", answer, _STATX_MASK_AT)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("II", answer, _STATX_DIO_AT)
    return DirectAlignment(offset=offset, memory=memory)


def _tried_alignment(fd: int) -> DirectAlignment | None:
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory, memoryview(memory) as view:
        for size in (512, mmap.PAGESIZE):
            # `size` past a page's start: aligned to it, and to no more than it.
            with view[size : 2 * size] as buffer:
                try:
                    os.preadv(fd, [buffer], size)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                else:
                    return DirectAlignment(offset=size, memory=size)
    return None
