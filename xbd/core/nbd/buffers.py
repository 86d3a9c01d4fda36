"""Memory for requests' data, aligned for direct I/O, used again and again."""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

from xbd.core.units import KIB

_SMALLEST: Final = 4 * KIB
_SLAB: Final = 256 * KIB
"""Smaller buffers are cut from pieces of this size."""


class Buffer:
    """Page-aligned memory of a power of two of bytes."""

    __slots__ = ("address", "size", "view")

    def __init__(self, view: memoryview, address: int) -> None:
        self.view = view
        self.address = address
        self.size = view.nbytes


class BufferPool:
    """Buffers that are free.  How many there are in all is for its user to bound."""

    def __init__(self) -> None:
        self._free: dict[int, list[Buffer]] = {}

    def take(self, length: int) -> Buffer:
        """A buffer of at least `length` bytes, with whatever was in it last."""
        size = _SMALLEST if length <= _SMALLEST else 1 << (length - 1).bit_length()
        free = self._free.get(size)
        if not free:
            free = self._free[size] = _make(size)
        return free.pop()

    def give(self, buffer: Buffer) -> None:
        """Take it back; nobody may use it any more."""
        self._free[buffer.size].append(buffer)

    def clear(self) -> None:
        """Return the memory of all free buffers to the system."""
        self._free = {size: [] for size in self._free}


def _make(size: int) -> list[Buffer]:
    # Anonymous memory takes space when it is written to: a large buffer that a client never
    # fills costs nothing.  It goes when the last of its buffers does.
    memory = mmap.mmap(-1, max(size, _SLAB))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    view = memoryview(memory)
    return [Buffer(view[at : at + size], address + at) for at in range(0, len(memory), size)]
