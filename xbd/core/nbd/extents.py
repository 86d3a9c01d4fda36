"""What a driver answered to `resolve`, for one direction, until it takes it back."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

Entry = tuple[int, int, int, int]
"""Start and end on the disk, the host file's fd, and what to add for the offset in it."""

MAX_ENTRIES: Final = 4096
"""With more, it begins again: they are as quickly asked for as kept."""

_NOTHING: Final[Entry] = (0, 0, -1, 0)


class Extents:
    """Disjoint ranges of the disk, in order; neighbours that are one range in the file are one."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._entries: list[Entry] = []
        self._hot = _NOTHING
        """The one found last."""

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, start: int, end: int) -> Entry | None:
        """The entry that has all of the range."""
        entry = self._hot
        if entry[0] <= start and end <= entry[1]:
            return entry
        at = bisect_right(self._starts, start) - 1
        if at < 0 or self._entries[at][1] < end:
            return None
        self._hot = self._entries[at]
        return self._hot

    def add(self, entry: Entry) -> None:
        """It replaces what is known of its range."""
        start, end, fd, delta = entry
        if len(self._entries) >= MAX_ENTRIES:
            self.forget(0, self._entries[-1][1])
        self.forget(start, end)
        at = after = bisect_left(self._starts, start)
        if at and self._entries[at - 1][1:] == (start, fd, delta):
            at -= 1
            start = self._entries[at][0]
        if after < len(self._entries) and self._entries[after] == (
            end,
            self._entries[after][1],
            fd,
            delta,
        ):
            end = self._entries[after][1]
            after += 1
        self._starts[at:after] = [start]
        self._entries[at:after] = [(start, end, fd, delta)]

    def forget(self, start: int, end: int) -> None:
        """Nothing is known of the range any more."""
        self._hot = _NOTHING
        first = max(bisect_right(self._starts, start) - 1, 0)
        last = bisect_left(self._starts, end)
        kept = []
        for entry in self._entries[first:last]:
            if entry[0] < start:
                kept.append((entry[0], min(entry[1], start), *entry[2:]))
            if entry[1] > end:
                kept.append((max(entry[0], end), entry[1], *entry[2:]))
        self._entries[first:last] = kept
        self._starts[first:last] = [entry[0] for entry in kept]
