"""Writing whole clusters compressed: for filling a new image, not for a guest's writes.

Compressed clusters lie one behind the other, across the borders of host clusters; a host cluster's
count is that of the compressed clusters with bytes in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from xbd.core.driver import DriverError, WriteRequest
from xbd.core.driver.buffers import Cursor, gather, total
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.writing import Writer, given_up, writable_l2

_SHARED_AT_LEAST: Final = 2


@attrs.define(eq=False)
class _Packed:
    """A cluster of the disk on its way."""

    request: WriteRequest
    cluster: int
    data: bytes
    host: int = 0
    """Where it is to lie; 0: nowhere yet."""
    kept: bool = False
    """Its place belongs to the image, or nobody knows."""


class CompressedWriter:
    """As `Writer`, but compresses what are whole clusters and get smaller by it."""

    def __init__(self, image: Image, writer: Writer) -> None:
        self._image = image
        self._writer = writer

    def write(self, requests: Sequence[WriteRequest]) -> list[tuple[int, int]]:
        """Write all; each request's `error` says how it went.  Returns what `Writer.write` does."""
        packed: list[_Packed] = []
        plain: list[WriteRequest] = []
        parts: list[tuple[WriteRequest, WriteRequest]] = []
        for request in requests:
            for part in self._parts(request):
                one = self._pack(request, part)
                if one is None:
                    plain.append(part)
                    parts.append((request, part))
                else:
                    packed.append(one)
        moved = self._writer.write(plain)
        for request, part in parts:
            request.error = request.error or part.error
        with self._image.using():
            moved += self._write_packed([one for one in packed if one.request.error is None])
        self._writer.settle(requests)
        return moved

    def _parts(self, request: WriteRequest) -> list[WriteRequest]:
        cluster = self._image.header.cluster_size
        cursor = Cursor(request.buffers)
        offset, end = request.offset, request.offset + total(request.buffers)
        parts = []
        while offset < end:
            stop = min(end, offset - offset % cluster + cluster)
            parts.append(WriteRequest(offset, cursor.take(stop - offset)))
            offset = stop
        return parts

    def _pack(self, request: WriteRequest, part: WriteRequest) -> _Packed | None:
        image = self._image
        size = image.header.cluster_size
        length = total(part.buffers)
        whole = length == size or part.offset + length == image.size
        if part.offset % size or not whole:
            return None
        data = bytearray(size)
        gather(part.buffers, memoryview(data)[:length])
        packed = image.codec.compress(data, size)
        return None if packed is None else _Packed(request, part.offset // size, packed)

    def _write_packed(self, packed: list[_Packed]) -> list[tuple[int, int]]:
        image = self._image
        moved: list[tuple[int, int]] = []
        if not packed:
            return moved
        numbers = {one.cluster for one in packed}
        mine = False
        try:
            with image.lock:
                image.require_writable()
                while numbers & image.allocating:
                    image.unblocked.wait()
                image.allocating |= numbers
                mine = True
                for one in packed:
                    one.host = self._place(len(one.data))
                image.refcounts.write()
            self._store(packed)
            # Counts and data are durable before anything names them.
            image.host.flush()
            with image.lock:
                for one in packed:
                    self._link(one, moved)
        except DriverError as error:
            self._give_up(packed, error)
        finally:
            if mine:
                with image.lock:
                    image.allocating -= numbers
                    image.unblocked.notify_all()
        return moved

    def _place(self, length: int) -> int:
        """Host offset for so many bytes, counted in all clusters that they touch.  Locked."""
        refcounts, bits = self._image.refcounts, self._image.header.cluster_bits
        host = self._image.packed_until
        end = host + -host % (1 << bits)
        full = host < end and refcounts.get(host >> bits) >= refcounts.largest
        if full or refcounts.largest < _SHARED_AT_LEAST:
            host = end = 0
        taken: list[int] = []
        try:
            while end - host < length:
                cluster = refcounts.take()
                if cluster << bits != end:
                    refcounts.release(taken)
                    taken.clear()
                    host = cluster << bits
                taken.append(cluster)
                end = (cluster + 1) << bits
            if host >> bits not in taken:
                refcounts.change(host >> bits, 1)
        except DriverError:
            refcounts.release(taken)
            raise
        self._image.packed_until = host + length
        return host

    def _store(self, packed: list[_Packed]) -> None:
        """Write the bytes, neighbours together."""
        start, data = packed[0].host, bytearray()
        for one in packed:
            if one.host != start + len(data):
                self._image.host.write(start, data)
                start, data = one.host, bytearray()
            data += one.data
        self._image.host.write(start, data)

    def _link(self, one: _Packed, moved: list[tuple[int, int]]) -> None:
        """Let the L2 table name it, and give up what it named before.  Locked."""
        image, tables = self._image, self._image.tables
        width = 2 if tables.extended else 1
        index, place = divmod(one.cluster, tables.l2_entries)
        table = writable_l2(image, index)
        entry = layout.compressed_entry(one.host, len(one.data), tables.bits)
        gone = given_up(image, table[width * place], entry)
        image.require_data(gone)
        words = {width * place: entry}
        if tables.extended:
            words[2 * place + 1] = 0
        one.kept = True
        try:
            image.remap(index, words, moved)
        except DriverError:
            # What does the table name now?  If it can't be read, nothing is given up.
            there = tables.l2(index)
            one.kept = there is not None and there[width * place] == entry
            image.refcounts.release(gone if one.kept else ())
            raise
        image.refcounts.release(gone)

    def _give_up(self, packed: list[_Packed], error: DriverError) -> None:
        """What is not linked never will be."""
        image, bits = self._image, self._image.header.cluster_bits
        if isinstance(error, CorruptImage):
            image.mark_corrupt(error)
        with image.lock:
            for one in packed:
                if not one.kept and one.host:
                    last = one.host + len(one.data) - 1
                    image.refcounts.release(range(one.host >> bits, (last >> bits) + 1))
        for one in packed:
            one.request.error = error
