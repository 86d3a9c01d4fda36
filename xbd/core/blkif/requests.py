"""Decoded requests, everything in bytes.

Made once per request on the hot path, so they are plain attrs classes built from positions.
"""

from __future__ import annotations

import attrs

from xbd.core.blkif.constants import FLUSH_DISKCACHE, READ, WRITE_BARRIER
from xbd.core.blkif.segments import Segment
from xbd.core.units import GrantRef


@attrs.define(slots=True, eq=False)
class Transfer:
    """READ, WRITE, or a flush or barrier that carries data."""

    id: int
    operation: int
    """What the response has to repeat: of an indirect request the inner operation."""
    offset: int
    length: int
    segments: list[Segment]

    @property
    def write(self) -> bool:
        """From the guest's pages to the disk."""
        return self.operation != READ

    @property
    def barrier(self) -> bool:
        """Wait for everything before it, write, make it durable, hold back what comes after."""
        return self.operation == WRITE_BARRIER

    @property
    def flush(self) -> bool:
        """Make durable what is finished, before writing this."""
        return self.operation == FLUSH_DISKCACHE


Single = tuple[int, int, int, int, GrantRef, int]
"""A READ or WRITE of one segment: id, operation, offset, length, grant reference, start in the
page.  Most requests are that, and nothing is made faster than a tuple."""


@attrs.define(slots=True, eq=False)
class Flush:
    """FLUSH_DISKCACHE, or a WRITE_BARRIER, without data."""

    id: int
    operation: int


@attrs.define(slots=True, eq=False)
class Discard:
    """DISCARD of a range."""

    id: int
    operation: int
    offset: int
    length: int
    secure: bool


@attrs.define(slots=True, eq=False)
class Indirect:
    """INDIRECT: its segments lie in pages that have to be fetched; see `Decoder.expand`."""

    id: int
    operation: int
    offset: int
    nr_segments: int
    refs: tuple[GrantRef, ...]
    """The pages that hold the segments, no more than are needed."""


@attrs.define(slots=True, eq=False)
class Rejected:
    """A request that is answered at once."""

    id: int
    operation: int
    status: int
    reason: str


Request = Transfer | Flush | Discard | Indirect


def whole(request: Single | Request | Rejected) -> Request | Rejected:
    """The same request as an object."""
    if not isinstance(request, tuple):
        return request
    request_id, operation, offset, length, gref, start = request
    return Transfer(request_id, operation, offset, length, [(gref, start, length)])
