"""Whole transfers: preadv and pwritev until everything is done, whatever the kernel splits.

Blocking; run these in a thread (`run_blocking`), one call per batch.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Final

from xbd.core.units import MIB

IOV_MAX: Final = 1024
"""Buffers in one preadv or pwritev (Linux: UIO_MAXIOV)."""

_zeroes: Final = memoryview(
    mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
)
"""Page-aligned, as O_DIRECT wants it; the kernel's one zero page, so it takes no memory."""


def read_full(
    fd: int, buffers: Sequence[memoryview], offset: int, rest_fd: int | None = None
) -> int:
    """Fill the buffers from file `offset` on; returns bytes read, fewer only at the file's end.

    What the kernel leaves undone is read through `rest_fd`: an fd without O_DIRECT, because the
    rest may begin where nothing is aligned.
    """
    rest = list(buffers)
    done = 0
    while rest:
        got = os.preadv(fd, rest[:IOV_MAX], offset + done)
        if not got:
            break
        done += got
        rest = _advance(rest, got)
        fd = fd if rest_fd is None else rest_fd
    return done


def write_full(
    fd: int, buffers: Sequence[memoryview], offset: int, rest_fd: int | None = None
) -> None:
    """Write the buffers to file `offset` on.  `rest_fd`: as for `read_full`."""
    rest = list(buffers)
    done = 0
    while rest:
        put = os.pwritev(fd, rest[:IOV_MAX], offset + done)
        if not put:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += put
        rest = _advance(rest, put)
        fd = fd if rest_fd is None else rest_fd


def write_zero_bytes(fd: int, offset: int, length: int) -> None:
    """Write `length` zeroes at file `offset`."""
    end = offset + length
    while offset < end:
        piece = min(end - offset, len(_zeroes))
        write_full(fd, [_zeroes[:piece]], offset)
        offset += piece


def zero_tail(buffers: Sequence[memoryview], start: int) -> None:
    """Fill the buffers with zeroes from byte `start` of them all on."""
    for buffer in buffers:
        if start < len(buffer):
            buffer[start:] = bytes(len(buffer) - start)
        start = max(0, start - len(buffer))


def total(buffers: Sequence[memoryview]) -> int:
    """Bytes in all buffers."""
    return sum(map(len, buffers))


def _advance(buffers: list[memoryview], done: int) -> list[memoryview]:
    """The buffers without their first `done` bytes."""
    for place, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[place + 1 :]]
        done -= len(buffer)
    return []
