"""Places for first writes that the server takes by itself, in tables that a driver lends it.

A thread hop costs several times what such a write does.  An entry is written in trio's thread,
through the page cache: for processes in which nothing else is urgent.
"""

from __future__ import annotations

import os
import sys
import threading
from array import array
from bisect import bisect_right, insort
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import attrs

from xbd.core.nbd.extents import Entry

MOST_PLACES: Final = 4096
_WORD: Final = 8


@attrs.define(eq=False)
class _Loan:
    first: int
    """Units of the disk: the first one, and the one behind."""
    end: int
    entries: array[int]
    """The driver's memory."""
    position: int
    """In the file."""


class TableClaims:
    """`Claims` of one disk, for as long as it is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Of the loans and what was lent, and of the places."""
        self._loans: dict[int, _Loan] = {}
        self._firsts: list[int] = []
        """The loans' first units, ascending."""
        self._places: deque[int] = deque()
        self._pauses = 0
        self._fd = self._table_fd = -1
        self._unit = 1
        self._bits = 0

    # -- for the driver ---------------------------------------------------------------------

    largest_copy: Final = 0
    """See `Claims.largest_copy`."""

    def begin(
        self,
        fd: int,
        table_fd: int,
        unit: int,
        bits: int,
        *,
        behind: bool = False,
        copying: bool = False,
    ) -> None:
        """See `Claims.begin`."""
        if behind or copying:
            raise ValueError("nothing is copied here")
        self.end()
        self._fd, self._table_fd, self._unit, self._bits = fd, table_fd, unit, bits

    def lend(self, offset: int, entries: array[int], position: int) -> None:
        """See `Claims.lend`."""
        first = offset // self._unit
        with self._lock:
            if first not in self._loans:
                insort(self._firsts, first)
            self._loans[first] = _Loan(first, first + len(entries), entries, position)

    def take_back(self, offset: int) -> None:
        """See `Claims.take_back`."""
        with self._lock:
            self._drop(offset // self._unit)

    def supply(self, places: Sequence[int]) -> int:
        """See `Claims.supply`."""
        with self._lock:
            taken = min(len(places), MOST_PLACES - len(self._places))
            self._places.extend(places[:taken])
        return taken

    @property
    def supplied(self) -> int:
        """See `Claims.supplied`."""
        return len(self._places)

    def spoilt(self) -> list[int]:
        """See `Claims.spoilt`."""
        return []

    def end(self) -> list[int]:
        """See `Claims.end`."""
        with self._lock:
            self._loans.clear()
            self._firsts.clear()
            left = list(self._places)
            self._places.clear()
        return left

    # -- for the server, in trio's thread ---------------------------------------------------

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Nothing is claimed inside."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def take(self, start: int, end: int) -> list[Entry]:
        """Find places for what of this range has none; where that is now, in whole units.

        Waits until the page cache has the entries.
        """
        if self._pauses or not self._firsts:
            return []
        with self._lock:
            return self._take(start // self._unit, (end - 1) // self._unit + 1)

    def _take(self, unit: int, stop: int) -> list[Entry]:
        made: list[Entry] = []
        while unit < stop:
            loan = self._loan_of(unit)
            if loan is None:
                break
            last = min(stop, loan.end)
            free = unit
            while free < last and not loan.entries[free - loan.first]:
                free += 1
            if free - unit > len(self._places):
                break
            if free > unit and not self._enter(loan, unit, free, made):
                break
            unit = free if free > unit else unit + 1
        return made

    def _enter(self, loan: _Loan, unit: int, stop: int, made: list[Entry]) -> bool:
        """Give places to neighbours."""
        places = [self._places.popleft() for _ in range(unit, stop)]
        words = array("Q", [place | self._bits for place in places])
        packed = words[:]
        if sys.byteorder == "little":
            packed.byteswap()
        at = unit - loan.first
        if not self._write(packed.tobytes(), loan.position + at * _WORD):
            # Nobody knows what of it is in the file: those places are never used for anything
            # else, and the driver finds out what is wrong.
            self._drop(loan.first)
            return False
        loan.entries[at : at + len(words)] = words
        for start, place in enumerate(places, unit):
            low = start * self._unit
            made.append((low, low + self._unit, self._fd, place - low))
        return True

    def _write(self, data: bytes, position: int) -> bool:
        try:
            return os.pwrite(self._table_fd, data, position) == len(data)
        except OSError:
            return False

    def _loan_of(self, unit: int) -> _Loan | None:
        at = bisect_right(self._firsts, unit) - 1
        loan = self._loans[self._firsts[at]] if at >= 0 else None
        return loan if loan is not None and unit < loan.end else None

    def _drop(self, first: int) -> None:
        if self._loans.pop(first, None) is not None:
            self._firsts.remove(first)
