"""Tables that are mostly empty."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

_STEP: Final = 512
_ZEROES: Final = array("Q", bytes(8 * _STEP))


def used_entries(table: array[int], start: int = 0) -> Iterator[tuple[int, int]]:
    """Place and value of each entry from `start` on that is not 0.

    A table of 4 million entries takes milliseconds if there are few.
    """
    for first in range(start, len(table), _STEP):
        part = table[first : first + _STEP]
        if part == _ZEROES:
            continue
        for place, entry in enumerate(part, first):
            if entry:
                yield place, entry
