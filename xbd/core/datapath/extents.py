"""What drivers answered to `resolve`, kept until they take it back."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from typing import Protocol

from xbd.core.driver import HostExtent

MAX_EXTENTS = 4096
"""Extents kept per disk and direction; beyond that the cache starts again."""

Entry = tuple[int, int, int, int]
"""Start and end on the guest's disk, the host file's fd, and what to add for the host's offset."""

NOTHING: Entry = (0, 0, -1, 0)
"""An entry that holds no byte."""

_BEHIND = 1 << 63
"""Sorts behind any end of an extent."""


class Resolver(Protocol):
    """`DeviceAccess.resolve`."""

    def __call__(
        self, offset: int, length: int, *, for_write: bool
    ) -> Sequence[HostExtent] | None: ...


class ExtentCache:
    """Sorted, disjoint extents, once for reading (index 0) and once for writing (index 1)."""

    def __init__(self, resolve: Resolver) -> None:
        self._resolve = resolve
        self._tables: tuple[list[Entry], list[Entry]] = ([], [])
        self.hot: list[Entry] = [NOTHING, NOTHING]
        """The entry found last in each table: a ring's short cut within one wake-up."""

    def find(self, offset: int, length: int, *, for_write: bool) -> Entry | None:
        """An entry that holds the whole range, or None: ask the driver's async methods."""
        table = self._tables[for_write]
        at = bisect_right(table, (offset, _BEHIND, 0, 0)) - 1
        if at < 0 or offset + length > table[at][1]:
            self._ask(offset, length, for_write)
            at = bisect_right(table, (offset, _BEHIND, 0, 0)) - 1
            if at < 0 or offset + length > table[at][1]:
                return None
        self.hot[for_write] = table[at]
        return table[at]

    def _ask(self, offset: int, length: int, for_write: bool) -> None:
        extents = self._resolve(offset, length, for_write=for_write)
        if not extents:
            return
        table = self._tables[for_write]
        if len(table) + len(extents) > MAX_EXTENTS:
            table.clear()
        start = offset
        for extent in extents:
            end = start + extent.length
            _cut(table, start, end)
            insort(table, (start, end, extent.fd, extent.offset - start))
            start = end

    def forget(self, offset: int, length: int) -> None:
        """Drop what is known of a range."""
        for table in self._tables:
            _cut(table, offset, offset + length)
        self.hot = [NOTHING, NOTHING]


def _cut(table: list[Entry], start: int, end: int) -> None:
    """Take the range out of the table; what reaches beyond it stays."""
    first = max(bisect_right(table, (start, _BEHIND, 0, 0)) - 1, 0)
    last = first
    kept = []
    while last < len(table) and table[last][0] < end:
        old_start, old_end, fd, delta = table[last]
        if old_start < start:
            kept.append((old_start, min(old_end, start), fd, delta))
        if old_end > end:
            kept.append((max(end, old_start), old_end, fd, delta))
        last += 1
    table[first:last] = kept
