"""Holes and zeroes by fallocate: the best means first, and what the kernel refused not again.

Blocking; run these in a thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any, Final, Protocol

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10

_REFUSED: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
"""The kernel or the filesystem will never do it; every other errno is about this one call."""


def _fallocate_function() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    for name in ("fallocate64", "fallocate"):
        function = getattr(library, name, None)
        if function is not None:
            function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
            return function
    return None


_fallocate: Final = _fallocate_function()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); OSError with ENOSYS where the system has none."""
    if _fallocate is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while _fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free the space of a range of a file or a block device; it reads as zeroes then."""
    fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


class Space(Protocol):
    """How an open file or device gives space back.  Blocking."""

    def discard(self, offset: int, length: int) -> bool:
        """Drop the content of the range; False: cannot be done, now or later."""
        ...

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make the range read as zeroes; `may_unmap`: rather free its space."""
        ...


class FileSpace:
    """Gives back and zeroes ranges of one regular file.

    Which means work is found out by use and remembered for as long as the file is open.
    """

    def __init__(self, fd: int, write_zeroes: Callable[[int, int], None]) -> None:
        """`write_zeroes(offset, length)` writes them: the last resort."""
        self._fd = fd
        self._write_zeroes = write_zeroes
        self._refused: set[int] = set()

    def can_discard(self, beyond: int) -> bool:
        """Find out without touching content, by a hole `beyond` the file's end."""
        return self.discard(beyond, 1)

    def discard(self, offset: int, length: int) -> bool:
        """Free the range's space, so that it reads as zeroes; False: the filesystem cannot."""
        return self._try(_PUNCH_HOLE, offset, length)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make the range, which lies inside the file, read as zeroes.

        `may_unmap`: rather free its space; else it stays, or becomes, allocated.
        """
        if may_unmap and self.discard(offset, length):
            return
        if self._try(_ZERO_RANGE, offset, length):
            return
        if self.discard(offset, length) and self._try(0, offset, length):
            return
        self._write_zeroes(offset, length)

    def _try(self, means: int, offset: int, length: int) -> bool:
        if means in self._refused:
            return False
        try:
            fallocate(self._fd, means | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._refused.add(means)
            return False
        return True
