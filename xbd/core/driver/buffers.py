"""Lists of buffers: cutting, copying, and what a device's memory alignment makes of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence


def total(buffers: Sequence[memoryview]) -> int:
    """Bytes in all of them."""
    return sum(buffer.nbytes for buffer in buffers)


_NOTHING = memoryview(b"")


class Cursor:
    """Takes a list of buffers off piece by piece."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._rest = iter(buffers)
        self._current = _NOTHING

    def take(self, length: int) -> list[memoryview]:
        """The next `length` bytes."""
        taken = []
        while length:
            current, size = self._current, self._current.nbytes
            if not size:
                self._current = next(self._rest)
            elif size <= length:
                taken.append(current)
                length -= size
                self._current = _NOTHING
            else:
                taken.append(current[:length])
                self._current = current[length:]
                break
        return taken


def scatter(source: memoryview, buffers: Sequence[memoryview]) -> None:
    """Copy `source` into the buffers, one after the other."""
    at = 0
    for buffer in buffers:
        buffer[:] = source[at : at + buffer.nbytes]
        at += buffer.nbytes


def gather(buffers: Sequence[memoryview], target: memoryview) -> None:
    """Copy the buffers, one after the other, into `target`."""
    at = 0
    for buffer in buffers:
        target[at : at + buffer.nbytes] = buffer
        at += buffer.nbytes


def aligned_buffer(length: int, alignment: int) -> memoryview:
    """New writable memory, all zeroes, at a multiple of `alignment`."""
    memory = bytearray(length + alignment - 1)
    skip = -_address(memory) % alignment
    return memoryview(memory)[skip : skip + length]


def is_aligned(buffers: Sequence[memoryview], alignment: int) -> bool:
    """Whether every buffer's address and length are multiples of `alignment`."""
    if alignment == 1:
        return True
    for buffer in buffers:
        # The address of read-only memory can't be had from ctypes; a copy is the safe answer.
        if buffer.nbytes % alignment or buffer.readonly:
            return False
        if buffer.nbytes and _address(buffer) % alignment:
            return False
    return True


def _address(buffer: bytearray | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
