"""Locks that keep an image from being written twice, by xbd or by QEMU.

They are open-file-description locks: they belong to the open file, so they last for as long as
anything uses it, and that includes requests which the kernel still carries out for a process
that was killed.  A new daemon therefore waits a moment for the old one's lock.

Bytes: a writer locks the whole file.  A reader follows QEMU's convention (docs of its
``file.locking`` option; block/file-posix.c has the numbers): a shared lock on byte 100 + n says
"I use permission n", on byte 200 + n "I let nobody else have permission n".
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from xbd.core.errors import OpenFailed
from xbd.core.hostio.failures import describe, open_failure

T = TypeVar("T")

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_USED: Final = 100
_FORBIDDEN: Final = 200
_READ, _WRITE, _RESIZE = 0, 1, 3

_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_HELD: Final = frozenset({errno.EAGAIN, errno.EACCES})

PATIENCE_SECONDS = 1.0
_PAUSE_SECONDS: Final = 0.05


def lock_file(fd: int, name: str, *, exclusive: bool) -> None:
    """Lock an open file against writers, and if `exclusive` (fd must be writable) against readers.

    The lock ends when the last descriptor of this opening is closed.  Raises `OpenFailed`: EBUSY
    if another process has a lock in the way, ENOLCK where the filesystem has no locks.
    """
    try:
        if not hasattr(fcntl, "F_OFD_SETLK"):
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        elif exclusive:
            _set(fd, fcntl.F_WRLCK, 0, 0)
        else:
            for byte in (_USED + _READ, _FORBIDDEN + _WRITE, _FORBIDDEN + _RESIZE):
                _set(fd, fcntl.F_RDLCK, byte, 1)
            if _is_held(fd, _USED + _WRITE) or _is_held(fd, _USED + _RESIZE):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    except OSError as error:
        number = error.errno or errno.EIO
        if number in _HELD:
            raise open_failure(
                f"{name} is locked by another process",
                errno.EBUSY,
                "stop using it there, or set locking=no if both sides may share it",
            ) from None
        if number in _NO_LOCKS:
            raise OpenFailed(
                f"the filesystem of {name} has no locks: {describe(number)}; set locking=no, and "
                "make sure that nobody else writes to it",
                errno=errno.ENOLCK,
            ) from None
        raise open_failure(f"cannot lock {name}", number) from None


def _set(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _is_held(fd: int, byte: int) -> bool:
    """Whether anyone else has a lock, even a shared one, on this byte."""
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))[0]
    return answer != fcntl.F_UNLCK


async def while_busy(
    attempt: Callable[[], Awaitable[T]], patience_seconds: float | None = None
) -> T:
    """Repeat `attempt` while it raises `OpenFailed` with EBUSY, for `PATIENCE_SECONDS` if not
    told otherwise."""
    patience = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
    end = trio.current_time() + patience
    while True:
        try:
            return await attempt()
        except OpenFailed as error:
            if error.errno != errno.EBUSY or trio.current_time() >= end:
                raise
        await trio.sleep(_PAUSE_SECONDS)
