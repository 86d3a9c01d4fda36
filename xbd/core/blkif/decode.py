"""The one edge where requests are judged: what leaves here is in range, permitted and in bytes.

What is malformed, out of range or not permitted is a `BadRequest` (answered ERROR); what was not
offered is `Unoffered` (answered EOPNOTSUPP), whatever else is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from xbd.core.blkif.abi import Abi
from xbd.core.blkif.constants import (
    DISCARD,
    DISCARD_SECURE,
    FLUSH_DISKCACHE,
    INDIRECT,
    MAX_INDIRECT_PAGES,
    MAX_SEGMENTS,
    READ,
    RSP_EOPNOTSUPP,
    RSP_ERROR,
    SECTOR,
    SEGMENTS_PER_INDIRECT_PAGE,
    WRITE,
    WRITE_BARRIER,
)
from xbd.core.blkif.requests import Discard, Flush, Indirect, Rejected, Request, Single, Transfer
from xbd.core.blkif.segments import SEGMENT, SPANS, WHOLE_PAGE, read_segments, whole_pages
from xbd.core.errors import BadRequest, Disposition, GuestError, Unoffered
from xbd.core.units import PAGE_SIZE, GrantRef


@attrs.frozen(kw_only=True)
class Limits:
    """What a frontend may ask for: the disk's geometry and what was offered.  Bytes."""

    size: int
    logical_block: int
    """A power of two; offset and length of whatever is asked for are multiples of it."""
    read_only: bool
    flush: bool
    barrier: bool
    discard: bool
    discard_secure: bool
    max_indirect_segments: int
    """0: indirect requests were not offered."""


class Decoder:
    """Turns slots of one ring into requests.  `limits` may be replaced at any time."""

    def __init__(self, abi: Abi, limits: Limits) -> None:
        self.abi = abi
        self.limits = limits

    def decode_batch(self, entries: bytes) -> list[Single | Request | Rejected]:
        """Decode slots that lie one after the other; those that are wrong become `Rejected`.

        READs and WRITEs of one segment or of whole pages, which is nearly all that guests send,
        are judged in line.
        """
        abi = self.abi
        limits = self.limits
        size = limits.size
        misaligned = limits.logical_block - 1
        last_permitted = READ if limits.read_only else WRITE
        requests: list[Single | Request | Rejected] = []
        append = requests.append
        find_span = SPANS.get
        whole_page = SPANS[WHOLE_PAGE]
        for operation, count, request_id, sector, gref, bounds in abi.head.iter_unpack(entries):
            if operation <= last_permitted:
                offset = sector * SECTOR
                if count == 1:
                    span = whole_page if bounds == WHOLE_PAGE else find_span(bounds)
                    if span:
                        start, length = span
                        if offset + length <= size and not (offset | length) & misaligned:
                            append((request_id, operation, offset, length, gref, start))
                            continue
                elif 0 < count <= MAX_SEGMENTS:
                    at = len(requests) * abi.request_size + abi.segments_offset
                    flat = abi.segments[count].unpack_from(entries, at)
                    segments = whole_pages(flat[::2], flat[1::2])
                    length = count * PAGE_SIZE
                    if segments and offset + length <= size and not (offset | length) & misaligned:
                        append(Transfer(request_id, operation, offset, length, segments))
                        continue
            append(self._decode_or_reject(entries, len(requests), request_id))
        return requests

    def _decode_or_reject(self, entries: bytes, at: int, request_id: int) -> Request | Rejected:
        size = self.abi.request_size
        entry = entries[at * size : (at + 1) * size]
        try:
            return self.decode(entry)
        except GuestError as error:
            operation = entry[1] if entry[0] == INDIRECT else entry[0]
            unsupported = error.disposition is Disposition.ANSWER_UNSUPPORTED
            status = RSP_EOPNOTSUPP if unsupported else RSP_ERROR
            return Rejected(request_id, operation, status, str(error))

    def decode(self, entry: bytes) -> Request:
        """Decode one slot.  Raises `BadRequest` or `Unoffered`."""
        operation = entry[0]
        if operation <= WRITE:
            return self._direct(entry)
        if operation <= FLUSH_DISKCACHE:
            return self._flush(entry)
        if operation == INDIRECT:
            return self._indirect(entry)
        if operation == DISCARD:
            return self._discard(entry)
        raise Unoffered(f"unknown operation {operation}")

    def _direct(self, entry: bytes) -> Transfer:
        operation, count, request_id, sector, _, _ = self.abi.head.unpack(entry)
        if not 1 <= count <= MAX_SEGMENTS:
            raise BadRequest(f"{count} segments in a direct request (1 to {MAX_SEGMENTS})")
        flat = self.abi.segments[count].unpack_from(entry, self.abi.segments_offset)
        return self._transfer(request_id, operation, sector * SECTOR, flat[::2], flat[1::2])

    def _flush(self, entry: bytes) -> Transfer | Flush:
        """FLUSH_DISKCACHE or WRITE_BARRIER.  Without data even a read-only disk takes it."""
        operation, count, request_id, *_ = self.abi.head.unpack(entry)
        if operation == FLUSH_DISKCACHE and not self.limits.flush:
            raise Unoffered("flush was not offered")
        if operation == WRITE_BARRIER and not self.limits.barrier:
            raise Unoffered("barriers were not offered")
        return self._direct(entry) if count else Flush(request_id, operation)

    def _transfer(
        self,
        request_id: int,
        operation: int,
        offset: int,
        grefs: Sequence[GrantRef],
        bounds: tuple[int, ...],
    ) -> Transfer:
        if operation != READ and self.limits.read_only:
            raise BadRequest("write to a read-only disk")
        segments, length = read_segments(grefs, bounds)
        self._check_range(offset, length)
        return Transfer(request_id, operation, offset, length, segments)

    def _check_range(self, offset: int, length: int) -> None:
        limits = self.limits
        if offset + length > limits.size:
            raise BadRequest(
                f"bytes {offset} to {offset + length} of a disk of {limits.size} bytes"
            )
        if (offset | length) & (limits.logical_block - 1):
            raise BadRequest(
                f"byte {offset}, length {length}: not a multiple of {limits.logical_block}"
            )

    def _discard(self, entry: bytes) -> Discard:
        """DISCARD.  Of no sectors it does nothing: a hint is no reason to fail a guest.

        (Linux's block layer has answered that with success and with EINVAL, by version.)
        """
        _, flag, _, request_id, sector, count = self.abi.discard.unpack(entry)
        secure = bool(flag & DISCARD_SECURE)
        if not self.limits.discard:
            raise Unoffered("discard was not offered")
        if secure and not self.limits.discard_secure:
            # blkif.h would have the flag ignored; but then the data would stay, and nobody knew.
            raise Unoffered("secure discard was not offered")
        if self.limits.read_only:
            raise BadRequest("discard on a read-only disk")
        self._check_range(sector * SECTOR, count * SECTOR)
        return Discard(request_id, DISCARD, sector * SECTOR, count * SECTOR, secure)

    def _indirect(self, entry: bytes) -> Indirect:
        _, operation, count, request_id, sector, _, *refs = self.abi.indirect.unpack(entry)
        most = min(
            self.limits.max_indirect_segments, MAX_INDIRECT_PAGES * SEGMENTS_PER_INDIRECT_PAGE
        )
        if not most:
            raise Unoffered("indirect requests were not offered")
        if operation not in (READ, WRITE):
            raise BadRequest(f"operation {operation} in an indirect request")
        if operation == WRITE and self.limits.read_only:
            raise BadRequest("write to a read-only disk")
        if not 1 <= count <= most:
            raise BadRequest(f"{count} segments in an indirect request (1 to {most})")
        # What begins past the end, or askew, needs no page fetched to be refused.
        self._check_range(sector * SECTOR, 0)
        pages = -(-count // SEGMENTS_PER_INDIRECT_PAGE)
        return Indirect(request_id, operation, sector * SECTOR, count, tuple(refs[:pages]))

    def expand(self, indirect: Indirect, pages: Sequence[bytes]) -> Transfer:
        """The transfer that an indirect request's pages describe.

        `pages`: private copies, each but the last whole, the last as long as it is used at least.
        Raises `BadRequest`.
        """
        table = b"".join(pages)[: indirect.nr_segments * SEGMENT.size]
        assert len(table) == indirect.nr_segments * SEGMENT.size, "an indirect page is missing"
        grefs, bounds = zip(*SEGMENT.iter_unpack(table), strict=True)
        return self._transfer(indirect.id, indirect.operation, indirect.offset, grefs, bounds)
