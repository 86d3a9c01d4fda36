"""Where a file has data and where holes, by SEEK_DATA and SEEK_HOLE (lseek(2)).

Blocking; run these in a thread.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

MAX_LOOKS: Final = 1024
"""Runs of each kind that one call tells of; a file can have as many as it has blocks."""

_UNTOLD: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""The filesystem can't say where its holes are."""


def data_runs(fd: int, offset: int, length: int) -> list[tuple[int, bool]]:
    """Runs of data (True) and of holes, which read as zeroes: (bytes, whether it is data).

    They follow each other from `offset` on, cover at least its byte and at most the range.  What
    nothing is known of is data: what is no regular file, what lies behind the file's end, and
    everything where the filesystem does not tell.  Raises OSError.
    """
    status = os.fstat(fd)
    end = min(offset + length, status.st_size)
    runs: list[tuple[int, bool]] = []
    if stat.S_ISREG(status.st_mode) and offset < end:
        try:
            _look(fd, offset, end, runs)
        except OSError as error:
            if error.errno not in _UNTOLD:
                raise
    return runs or [(length, True)]


def _look(fd: int, offset: int, end: int, runs: list[tuple[int, bool]]) -> None:
    for _ in range(MAX_LOOKS):
        data = _seek(fd, offset, os.SEEK_DATA, end)
        if data > offset:
            runs.append((data - offset, False))
        if data >= end:
            return
        offset = _seek(fd, data, os.SEEK_HOLE, end)
        if offset > data:  # or somebody has just made a hole of it: look again
            runs.append((offset - data, True))
        if offset >= end:
            return


def _seek(fd: int, offset: int, what: int, end: int) -> int:
    try:
        return min(os.lseek(fd, offset, what), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing more of that kind
            return end
        raise
