"""Many transfers at a time from one blocking call, by io_uring."""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from xbd.core.hostio.transfer import IOV_MAX
from xbd.core.hostio.uring import IoUring

DEPTH: Final = 64
"""Transfers under way at a time."""

_IDLE_RINGS: Final = 4

Piece = tuple[int, int, Sequence[memoryview]]
"""An fd, an offset in its file, and buffers: writable memory that stays until the call's end."""


class ParallelIo:
    """Callable from many threads; each call has a ring to itself.

    Each method tells of each piece whether it was moved whole.  What was not is for the caller to
    try again alone, and to learn why; where there is no io_uring, that is everything.
    """

    def __init__(self) -> None:
        self._idle: list[IoUring] = []
        self._lock = threading.Lock()
        self._missing = False

    def read(self, pieces: Sequence[Piece]) -> list[bool]:
        """Fill the pieces' buffers."""
        return self._with_ring(partial(_move, pieces, write=False), len(pieces))

    def write(self, pieces: Sequence[Piece]) -> list[bool]:
        """Write the pieces' buffers."""
        return self._with_ring(partial(_move, pieces, write=True), len(pieces))

    def copy(self, copies: Sequence[tuple[Piece, Piece]]) -> list[bool]:
        """Fill each first piece's buffers; as soon as they are full, write the second one's.

        The second piece is not touched where the first one was not moved whole.
        """
        return self._with_ring(partial(_copy, copies), len(copies))

    def _with_ring(self, move: Callable[[IoUring], list[bool]], count: int) -> list[bool]:
        ring = self._take()
        if ring is None:
            return [False] * count
        try:
            return move(ring)
        finally:
            self._put(ring)

    def _take(self) -> IoUring | None:
        with self._lock:
            if self._missing:
                return None
            if self._idle:
                return self._idle.pop()
        try:
            return IoUring(DEPTH)
        except OSError:
            self._missing = True
            return None

    def _put(self, ring: IoUring) -> None:
        if ring.in_flight:
            ring.abandon()  # the kernel still uses it
            return
        with self._lock:
            if len(self._idle) < _IDLE_RINGS:
                self._idle.append(ring)
                return
        ring.close()

    def close(self) -> None:
        """Give the rings back; nobody may be using them."""
        while self._idle:
            self._idle.pop().close()


def _move(pieces: Sequence[Piece], ring: IoUring, *, write: bool) -> list[bool]:
    moved = [False] * len(pieces)
    lengths = [0] * len(pieces)
    vectors = []  # kept until the end: the kernel may look at them for as long as it works
    queue = ring.writev if write else ring.readv
    todo = iter(enumerate(pieces))
    left = len(pieces)
    while left:
        while ring.free and ring.in_flight < DEPTH and (item := next(todo, None)) is not None:
            number, (fd, offset, buffers) = item
            if len(buffers) > IOV_MAX:
                left -= 1
                continue
            vector = _vector(buffers)
            vectors.append(vector)
            lengths[number] = sum(vector[1::2])
            queue(fd, vector.buffer_info()[0], len(buffers), offset, number)
        if not ring.in_flight:
            break
        ring.wait(1)
        for number, done in ring.reap():
            moved[number] = done == lengths[number]
            left -= 1
    return moved


def _copy(copies: Sequence[tuple[Piece, Piece]], ring: IoUring) -> list[bool]:
    copied = [False] * len(copies)
    lengths = [0, 0] * len(copies)
    vectors = []  # kept until the end: the kernel may look at them for as long as it works

    def start(number: int, *, write: bool) -> None:
        fd, offset, buffers = copies[number][write]
        vector = _vector(buffers)
        vectors.append(vector)
        step = 2 * number + write
        lengths[step] = sum(vector[1::2])
        queue = ring.writev if write else ring.readv
        queue(fd, vector.buffer_info()[0], len(buffers), offset, step)

    todo = iter(range(len(copies)))
    while True:
        # Each read that ends makes room for its write.
        while ring.free and ring.in_flight < DEPTH and (number := next(todo, None)) is not None:
            start(number, write=False)
        if not ring.in_flight:
            return copied
        ring.wait(1)
        for step, done in ring.reap():
            number, write = divmod(step, 2)
            if done != lengths[step]:
                continue
            if write:
                copied[number] = True
            else:
                start(number, write=True)


def _vector(buffers: Sequence[memoryview]) -> array[int]:
    """As the kernel's ``struct iovec``."""
    vector = array("Q")
    for buffer in buffers:
        vector.append(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
        vector.append(buffer.nbytes)
    return vector
