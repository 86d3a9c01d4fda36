"""What the data path in C does with tables that drivers lend it, in Python."""

from __future__ import annotations

import os
import threading
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs

from xbd.core.driver import DriverError

MOST_UNITS = 64
MOST_PLACES = 4096

Known = Callable[[int, int], bool]
"""``known(start, end)``: whether that range of the disk has extents for writing."""
Write = Callable[[int, bytes], None]


@attrs.define
class _Loan:
    entries: array[int]
    position: int


class ModelClaims:
    """`Claims` of one disk; contract: tests/datapath/test_claims.py."""

    def __init__(self, known: Known | None = None, write: Write | None = None) -> None:
        """`known`: None: only what was claimed is.  `write`: for a file that is watched."""
        self._known = known or self._claimed
        self._write = write or self._pwrite
        self._units: set[int] = set()
        self._loans: dict[int, _Loan] = {}
        self._places: deque[int] = deque()
        self._pauses = 0
        self._lock = threading.Lock()
        self._table_fd = -1
        self._unit = self._bits = 0

    def begin(self, fd: int, table_fd: int, unit: int, bits: int) -> None:
        self.end()
        self._table_fd, self._unit, self._bits = table_fd, unit, bits

    def lend(self, offset: int, entries: array[int], position: int) -> None:
        with self._lock:
            self._loans[offset // self._unit] = _Loan(entries, position)

    def take_back(self, offset: int) -> None:
        with self._lock:
            self._loans.pop(offset // self._unit, None)

    def supply(self, places: Sequence[int]) -> int:
        with self._lock:
            taken = min(len(places), MOST_PLACES - len(self._places))
            self._places.extend(places[:taken])
            return taken

    @property
    def supplied(self) -> int:
        return len(self._places)

    def end(self) -> list[int]:
        with self._lock:
            self._loans.clear()
            left = list(self._places)
            self._places.clear()
            return left

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        self._pauses += 1
        yield
        self._pauses -= 1

    def take(self, offset: int, length: int) -> bool:
        """Find places for all of a range; whether that was possible."""
        with self._lock:
            return bool(self._loans) and self._take(offset, length)

    def _take(self, offset: int, length: int) -> bool:
        end = offset + length
        needy: list[int] = []
        for unit in range(offset // self._unit, (end - 1) // self._unit + 1):
            first = self._loan_of(unit)
            if first is None:
                return False
            if self._loans[first].entries[unit - first]:
                start = max(offset, unit * self._unit)
                if not self._known(start, min(end, (unit + 1) * self._unit)):
                    return False
            else:
                needy.append(unit)
        if self._pauses or len(needy) > min(MOST_UNITS, len(self._places)):
            return False
        places = [self._places.popleft() for _ in needy]
        for unit, place in zip(needy, places, strict=True):
            first = self._loan_of(unit)
            assert first is not None
            loan, entry = self._loans[first], place | self._bits
            try:
                self._write(loan.position + (unit - first) * 8, entry.to_bytes(8, "big"))
            except (OSError, DriverError):
                del self._loans[first]
                return False
            loan.entries[unit - first] = entry
            self._units.add(unit)
        return True

    def _loan_of(self, unit: int) -> int | None:
        for first, loan in self._loans.items():
            if first <= unit < first + len(loan.entries):
                return first
        return None

    def _claimed(self, start: int, _: int) -> bool:
        return start // self._unit in self._units

    def _pwrite(self, offset: int, data: bytes) -> None:
        os.pwrite(self._table_fd, data, offset)
