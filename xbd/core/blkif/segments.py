"""Segments: which part of which granted page, 8 bytes each, alike in all ABIs.

In memory: gref u32 at 0, first_sect u8 at 4, last_sect u8 at 5, 2 bytes of padding.  The two
sectors are read as one little-endian number, the segment's bounds, because then one look into a
table of the 36 bounds that are allowed is both their check and their translation into bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from xbd.core.blkif.constants import MAX_SEGMENTS, SECTOR, SECTORS_PER_PAGE
from xbd.core.errors import BadRequest
from xbd.core.units import PAGE_SIZE, GrantRef

Segment = tuple[GrantRef, int, int]
"""Grant reference, start in the page and length, in bytes."""

SEGMENT: Final = struct.Struct("<IHxx")
"""gref and bounds."""


def bounds_of(first: int, last: int) -> int:
    """What first_sect and last_sect (inclusive) are as one number."""
    return first | last << 8


SPANS: Final = {
    bounds_of(first, last): (first * SECTOR, (last - first + 1) * SECTOR)
    for first in range(SECTORS_PER_PAGE)
    for last in range(first, SECTORS_PER_PAGE)
}
"""Start and length in the page, in bytes, by bounds: first_sect <= last_sect <= 7."""

WHOLE_PAGE: Final = bounds_of(0, SECTORS_PER_PAGE - 1)
"""By far the most frequent bounds."""
_ALL_WHOLE: Final = tuple((WHOLE_PAGE,) * count for count in range(MAX_SEGMENTS + 1))
_STARTS: Final = (0,) * MAX_SEGMENTS
_LENGTHS: Final = (PAGE_SIZE,) * MAX_SEGMENTS


def whole_pages(grefs: Sequence[GrantRef], bounds: tuple[int, ...]) -> list[Segment] | None:
    """At most 11 segments that are whole pages; None if some of them are not."""
    count = len(bounds)
    if bounds == _ALL_WHOLE[count]:
        return list(zip(grefs, _STARTS, _LENGTHS))  # noqa: B905 (as many as there are grefs)
    return None


def read_segments(grefs: Sequence[GrantRef], bounds: tuple[int, ...]) -> tuple[list[Segment], int]:
    """Any number of segments, and their bytes in all.  Raises `BadRequest`."""
    try:
        spans = [SPANS[both] for both in bounds]
    except KeyError as error:
        both = error.args[0]
        raise BadRequest(f"segment from sector {both & 0xFF} to {both >> 8} of a page") from None
    segments = [(gref, start, length) for gref, (start, length) in zip(grefs, spans, strict=True)]
    return segments, sum([length for _, length in spans])
