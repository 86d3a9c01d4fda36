"""The one edge where requests are judged: what leaves here is in range, permitted and in bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import attrs

from xbd.core.blkif.abi import Abi
from xbd.core.blkif.constants import (
    DISCARD,
    DISCARD_SECURE,
    FLUSH_DISKCACHE,
    INDIRECT,
    MAX_SEGMENTS,
    READ,
    RSP_EOPNOTSUPP,
    RSP_ERROR,
    SECTOR,
    SECTORS_PER_PAGE,
    SEGMENTS_PER_INDIRECT_PAGE,
    WRITE,
    WRITE_BARRIER,
)
from xbd.core.blkif.requests import (
    Discard,
    Flush,
    Indirect,
    Rejected,
    Request,
    Segment,
    Transfer,
)
from xbd.core.errors import BadRequest, Unoffered
from xbd.core.units import GrantRef

_SEGMENT: Final = struct.Struct("<IBBxx")


@attrs.frozen(kw_only=True)
class Limits:
    """What a frontend may ask for: the disk's geometry and what was offered.  Bytes."""

    size: int
    logical_block: int
    read_only: bool
    flush: bool
    barrier: bool
    discard: bool
    discard_secure: bool
    max_indirect_segments: int


class Decoder:
    """Turns slots of one ring into requests.  `limits` may be replaced at any time."""

    def __init__(self, abi: Abi, limits: Limits) -> None:
        self.abi = abi
        self.limits = limits

    def decode_batch(self, entries: bytes) -> list[Request | Rejected]:
        """Decode slots that lie one after the other; those that are wrong become `Rejected`."""
        abi = self.abi
        limits = self.limits
        size = limits.size
        misaligned = limits.logical_block - 1
        last_writable = READ if limits.read_only else WRITE
        requests: list[Request | Rejected] = []
        append = requests.append
        for at, slot in enumerate(abi.head.iter_unpack(entries)):
            operation, count, _, request_id, sector, gref, first, last = slot
            if count == 1 and operation <= last_writable and first <= last < SECTORS_PER_PAGE:
                length = (last - first + 1) * SECTOR
                offset = sector * SECTOR
                if offset + length <= size and not (offset | length) & misaligned:
                    segment = (gref, first * SECTOR, length)
                    append(
                        Transfer(
                            request_id, operation, offset, length, [segment],
                            operation == WRITE, False, False,
                        )
                    )  # fmt: skip
                    continue
            append(self._decode_or_reject(entries, at * abi.request_size, request_id))
        return requests

    def _decode_or_reject(self, entries: bytes, at: int, request_id: int) -> Request | Rejected:
        try:
            return self.decode(entries[at : at + self.abi.request_size])
        except (BadRequest, Unoffered) as error:
            operation = entries[at + 1] if entries[at] == INDIRECT else entries[at]
            status = RSP_ERROR if isinstance(error, BadRequest) else RSP_EOPNOTSUPP
            return Rejected(request_id, operation, status, str(error))

    def decode(self, entry: bytes) -> Request:
        """Decode one slot.  Raises `BadRequest` or `Unoffered`."""
        operation = entry[0]
        if operation == INDIRECT:
            return self._indirect(entry)
        if operation == DISCARD:
            return self._discard(entry)
        if operation in (READ, WRITE, WRITE_BARRIER, FLUSH_DISKCACHE):
            return self._direct(entry)
        raise Unoffered(f"unknown operation {operation}")

    def _direct(self, entry: bytes) -> Request:
        operation, count, _, request_id, sector, *segment = self.abi.head.unpack(entry)
        limits = self.limits
        if operation == FLUSH_DISKCACHE and not limits.flush:
            raise Unoffered("flush was not offered")
        if operation == WRITE_BARRIER and not limits.barrier:
            raise Unoffered("barriers were not offered")
        if not count and operation in (FLUSH_DISKCACHE, WRITE_BARRIER):
            return Flush(request_id, operation)
        if not 1 <= count <= MAX_SEGMENTS:
            raise BadRequest(f"{count} segments in a direct request (1 to {MAX_SEGMENTS})")
        numbers = [*segment, *self.abi.rest.unpack_from(entry, self.abi.segments_offset + 8)]
        triples = list(zip(*[iter(numbers[: 3 * count])] * 3, strict=True))
        return self._transfer(request_id, operation, sector * SECTOR, triples)

    def _transfer(
        self,
        request_id: int,
        operation: int,
        offset: int,
        triples: Sequence[tuple[GrantRef, int, int]],
    ) -> Transfer:
        """`triples`: grant reference, first and last sector of each segment."""
        write = operation != READ
        if write and self.limits.read_only:
            raise BadRequest("write to a read-only disk")
        segments: list[Segment] = []
        length = 0
        for gref, first, last in triples:
            if not first <= last < SECTORS_PER_PAGE:
                raise BadRequest(f"segment from sector {first} to {last} of a page")
            size = (last - first + 1) * SECTOR
            segments.append((gref, first * SECTOR, size))
            length += size
        self._check_range(offset, length)
        barrier = operation == WRITE_BARRIER
        flush = operation == FLUSH_DISKCACHE
        return Transfer(request_id, operation, offset, length, segments, write, barrier, flush)

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
        _, flag, _, request_id, sector, count = self.abi.discard.unpack(entry)
        secure = bool(flag & DISCARD_SECURE)
        if not self.limits.discard or (secure and not self.limits.discard_secure):
            raise Unoffered(
                "secure discard was not offered" if secure else "discard was not offered"
            )
        if self.limits.read_only:
            raise BadRequest("discard on a read-only disk")
        if not count:
            raise BadRequest("discard of no sectors")
        self._check_range(sector * SECTOR, count * SECTOR)
        return Discard(request_id, DISCARD, sector * SECTOR, count * SECTOR, secure)

    def _indirect(self, entry: bytes) -> Indirect:
        _, operation, count, request_id, sector, _, *refs = self.abi.indirect.unpack(entry)
        most = self.limits.max_indirect_segments
        if not most:
            raise Unoffered("indirect requests were not offered")
        if operation not in (READ, WRITE):
            raise BadRequest(f"operation {operation} in an indirect request")
        if operation == WRITE and self.limits.read_only:
            raise BadRequest("write to a read-only disk")
        if not 1 <= count <= most:
            raise BadRequest(f"{count} segments in an indirect request (1 to {most})")
        pages = -(-count // SEGMENTS_PER_INDIRECT_PAGE)
        return Indirect(request_id, operation, sector * SECTOR, count, tuple(refs[:pages]))

    def expand(self, indirect: Indirect, pages: Sequence[bytes]) -> Transfer:
        """The transfer that an indirect request's pages describe.

        `pages`: private copies, each at least as long as it is used.  Raises `BadRequest`.
        """
        table = b"".join(pages)[: indirect.nr_segments * _SEGMENT.size]
        triples = list(_SEGMENT.iter_unpack(table))
        assert len(triples) == indirect.nr_segments, "an indirect page is missing"
        return self._transfer(indirect.id, indirect.operation, indirect.offset, triples)
