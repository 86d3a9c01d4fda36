"""A refcount block: counts of any width between 1 and 64 bits, one per host cluster.

Source: QEMU's docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import sys
from array import array
from typing import Final

_CODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}
_SWAP: Final = sys.byteorder == "little"


def _expansions(order: int) -> list[bytes]:
    """For each byte, the counts of 1, 2 or 4 bits in it, lowest bits first."""
    width = 1 << order
    mask = (1 << width) - 1
    return [bytes(byte >> shift & mask for shift in range(0, 8, width)) for byte in range(256)]


_EXPANSIONS: Final = {order: _expansions(order) for order in range(3)}


class RefcountBlock:
    """Counts in memory, one array element each, with a note of what is not written yet."""

    def __init__(self, data: bytes | bytearray, order: int) -> None:
        """`data` as it lies in the image; a count has ``1 << order`` bits."""
        self._order = order
        if order < 3:
            expansions = _EXPANSIONS[order]
            self.counts: array[int] = array("B", b"".join([expansions[byte] for byte in data]))
        else:
            self.counts = array(_CODES[order], bytes(data))
            if _SWAP:
                self.counts.byteswap()
        self._dirty: tuple[int, int] | None = None

    @property
    def largest(self) -> int:
        """What a count can't exceed."""
        return (1 << (1 << self._order)) - 1

    def set(self, index: int, count: int) -> None:
        self.counts[index] = count
        low, high = self._dirty or (index, index)
        self._dirty = (min(low, index), max(high, index))

    def fill(self, low: int, high: int, count: int) -> None:
        """`set` for all of [low, high)."""
        self.counts[low:high] = array(self.counts.typecode, [count]) * (high - low)
        for index in (low, high - 1):
            self.set(index, count)

    def free_from(self, index: int, most: int) -> int:
        """How many counts from here on are 0; `most`, or some number that may be too small."""
        while most > 0 and any(self.counts[index : index + most]):
            most //= 2
        return max(0, min(most, len(self.counts) - index))

    def dirty(self) -> tuple[int, bytes] | None:
        """Where in the block something changed since `clean`, in bytes, and what is there."""
        if self._dirty is None:
            return None
        low, high = self._dirty
        if self._order >= 3:
            return low << self._order - 3, self.pack(low, high + 1)
        per_byte = 8 >> self._order
        low -= low % per_byte
        return low // per_byte, self.pack(low, high + 1 + -(high + 1) % per_byte)

    def clean(self) -> None:
        """What is here is written."""
        self._dirty = None

    def take_dirty(self) -> tuple[int, bytes] | None:
        """`dirty`, and `clean`."""
        change = self.dirty()
        self.clean()
        return change

    def pack(self, low: int, high: int) -> bytes:
        """The counts [low, high) as they lie in the image; whole bytes."""
        part = self.counts[low:high]
        if self._order >= 3:
            if _SWAP:
                part.byteswap()
            return part.tobytes()
        per_byte = 8 >> self._order
        width = 1 << self._order
        packed = bytearray(len(part) // per_byte)
        for place in range(per_byte):
            for index, count in enumerate(part[place::per_byte]):
                packed[index] |= count << place * width
        return bytes(packed)
