"""Reading from an image: many requests at a time.

What they want is sorted by where it lies: plain clusters are read side by side, each compressed
cluster is unpacked once, and the images behind get their share as one batch too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import attrs

from xbd.core.driver import DriverError, ReadRequest
from xbd.core.driver.buffers import Cursor, scatter, total
from xbd.core.units import KIB
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.host import Transfer
from xbd.drivers.qcow2.refcounts import LARGEST_OFFSET
from xbd.drivers.qcow2.tables import Kind, Piece

if TYPE_CHECKING:
    from xbd.drivers.qcow2.image import Image

MOST_COPIED: Final = 64 * KIB
"""Of unpacked bytes that a read gets without a thread: they cost some 5 us."""

_LITTLE: Final = 16 * KIB
"""Of bytes in packed clusters, for which a thread costs more than it gives."""


@attrs.define(eq=False)
class _Wanted:
    """What a request wants of one compressed cluster."""

    request: ReadRequest
    start: int
    length: int
    buffers: Sequence[memoryview]


@attrs.define(eq=False)
class _Plan:
    """What a batch wants, by where it lies."""

    plain: list[tuple[ReadRequest, Transfer]] = attrs.field(factory=list)
    packed: dict[int, list[_Wanted]] = attrs.field(factory=dict)
    """By L2 entry."""
    behind: list[tuple[ReadRequest, ReadRequest]] = attrs.field(factory=list)
    """Each with what is asked of the backing file for it."""


class Reader:
    """Reads from one image; any number of batches at a time."""

    def __init__(self, image: Image) -> None:
        self._image = image

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Read all; each request's `error` says how it went."""
        plan = _Plan()
        with self._image.using():
            for request in requests:
                try:
                    self._plan(request, plan)
                except DriverError as error:
                    request.error = error
            if plan.plain:
                self._read_plain(plan.plain)
            self._read_packed(plan.packed)
            if plan.behind and self._image.backing is not None:
                self._image.backing.read([below for _, below in plan.behind])
                for request, below in plan.behind:
                    request.error = request.error or below.error

    def read_known(
        self, offset: int, buffers: Sequence[memoryview], *, unpack: bool = False
    ) -> bool:
        """Read what is in memory or all zeroes, if all of it is.  Never waits.

        `unpack`: also a little of what can be unpacked without waiting.
        """
        length = total(buffers)
        with self._image.using():
            try:
                known = self._known(offset, length, unpack=unpack and length <= _LITTLE)
            except CorruptImage:
                return False  # reading it says what is wrong
            if known is None:
                return False
            cursor = Cursor(buffers)
            for size, data in known:
                zero_or_scatter(data, cursor.take(size))
        return True

    def _known(
        self, offset: int, length: int, *, unpack: bool
    ) -> list[tuple[int, memoryview | None]] | None:
        """The range in pieces: length, and content or that it is zero; None: it is elsewhere."""
        image = self._image
        known: list[tuple[int, memoryview | None]] = []
        reach = 0
        for piece in image.tables.pieces(offset, length, wait=False):
            reach += piece.length
            if piece.kind is Kind.ZERO or (
                piece.kind is Kind.UNALLOCATED and image.backing is None
            ):
                known.append((piece.length, None))
                continue
            if piece.kind is not Kind.COMPRESSED or length > MOST_COPIED:
                return None
            start, stop = self._in_cluster(piece)
            data = image.unpacker.known(piece.host, stop)
            if data is None and unpack:
                data = image.unpacker.unpack_at_once(piece.host, stop)
            if data is None:
                return None
            known.append((piece.length, memoryview(data)[start:stop]))
        return known if reach == length else None

    def _in_cluster(self, piece: Piece) -> tuple[int, int]:
        start = piece.offset % self._image.header.cluster_size
        return start, start + piece.length

    # -- planning -----------------------------------------------------------------------------

    def _plan(self, request: ReadRequest, plan: _Plan) -> None:
        image = self._image
        cursor = Cursor(request.buffers)
        offset = request.offset
        end = offset + total(request.buffers)
        inside = min(end, max(image.size, offset))
        for piece in image.pieces(offset, inside - offset):
            buffers = cursor.take(piece.length)
            if piece.kind is Kind.NORMAL:
                if piece.host + piece.length > LARGEST_OFFSET:
                    raise CorruptImage(f"{image}: a cluster can't lie at {piece.host:#x}")
                plan.plain.append((request, Transfer(piece.host, buffers)))
            elif piece.kind is Kind.COMPRESSED:
                start, _ = self._in_cluster(piece)
                wanted = _Wanted(request, start, piece.length, buffers)
                plan.packed.setdefault(piece.host, []).append(wanted)
            elif piece.kind is Kind.UNALLOCATED and image.backing is not None:
                plan.behind.append((request, ReadRequest(piece.offset, buffers)))
            else:
                zero_or_scatter(None, buffers)
        if inside < end:
            zero_or_scatter(None, cursor.take(end - inside))

    # -- carrying out -------------------------------------------------------------------------

    def _read_plain(self, plain: Sequence[tuple[ReadRequest, Transfer]]) -> None:
        image, cipher = self._image, self._image.cipher
        transfers = [transfer for _, transfer in plain]
        if cipher is not None:
            transfers = [
                Transfer(one.offset, [image.buffer(total(one.buffers))]) for one in transfers
            ]
        failures = image.data_host.read_transfers(transfers)
        for (request, wanted), read, failure in zip(plain, transfers, failures, strict=True):
            if failure is not None:
                request.error = failure
            elif cipher is not None:
                (content,) = read.buffers
                cipher.decrypt(content, read.offset // layout.SECTOR)
                scatter(content, wanted.buffers)

    def _read_packed(self, packed: dict[int, list[_Wanted]]) -> None:
        needs = {
            entry: max(one.start + one.length for one in wanted) for entry, wanted in packed.items()
        }
        for entry, data in self._image.unpacker.unpack(needs):
            for one in packed[entry]:
                if isinstance(data, DriverError):
                    one.request.error = data
                else:
                    content = memoryview(data)[one.start : one.start + one.length]
                    scatter(content, one.buffers)


def zero_or_scatter(data: memoryview | None, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers with `data`, or with zeroes."""
    if data is not None:
        scatter(data, buffers)
        return
    for buffer in buffers:
        buffer[:] = bytes(buffer.nbytes)
