"""The front half's requests as bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Final

from xbd.core.blkif.abi import Abi
from xbd.core.blkif.constants import (
    DISCARD,
    DISCARD_SECURE,
    INDIRECT,
    MAX_INDIRECT_PAGES,
    MAX_SEGMENTS,
)

_SEGMENT: Final = struct.Struct("<IBBxx")
WireSegment = tuple[int, int, int]
"""Grant reference, first and last sector in the page."""


def encode_rw(
    abi: Abi,
    operation: int,
    request_id: int,
    sector: int,
    segments: Sequence[WireSegment],
    handle: int = 0,
) -> bytes:
    """READ, WRITE, WRITE_BARRIER or FLUSH_DISKCACHE with up to 11 segments."""
    if len(segments) > MAX_SEGMENTS:
        raise ValueError(f"{len(segments)} segments in a direct request")
    entry = bytearray(abi.request_size)
    entry[abi.segments_offset : abi.segments_offset + 8 * len(segments)] = pack_indirect_page(
        segments
    )
    struct.pack_into("<BBH", entry, 0, operation, len(segments), handle)
    struct.pack_into("<QQ", entry, abi.id_offset, request_id, sector)
    return bytes(entry)


def encode_discard(
    abi: Abi, request_id: int, sector: int, count: int, *, secure: bool = False, handle: int = 0
) -> bytes:
    """DISCARD of `count` sectors."""
    flag = DISCARD_SECURE if secure else 0
    return abi.discard.pack(DISCARD, flag, handle, request_id, sector, count)


def encode_indirect(
    abi: Abi,
    operation: int,
    request_id: int,
    sector: int,
    nr_segments: int,
    refs: Sequence[int],
    handle: int = 0,
) -> bytes:
    """INDIRECT of READ or WRITE (`operation`); `refs` are the pages that hold the segments."""
    if len(refs) > MAX_INDIRECT_PAGES:
        raise ValueError(f"{len(refs)} pages in an indirect request")
    padded = chain(refs, [0] * (MAX_INDIRECT_PAGES - len(refs)))
    return abi.indirect.pack(INDIRECT, operation, nr_segments, request_id, sector, handle, *padded)


def pack_indirect_page(segments: Sequence[WireSegment]) -> bytes:
    """Segments as they lie in a request or an indirect page."""
    return b"".join(_SEGMENT.pack(*segment) for segment in segments)
