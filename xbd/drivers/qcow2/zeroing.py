"""Discarding and zeroing: clusters are given up, or only said to be zero.

Replacing content by zeroes needs no new cluster, so nothing has to be durable before the L2
entry; what was there is released, and stays as it is until the entry is durable (`refcounts`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

from xbd.core.driver import DriverError, WriteRequest
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import ALL_ZERO, COMPRESSED, COPIED, ZERO
from xbd.drivers.qcow2.tables import Kind
from xbd.drivers.qcow2.writing import Writer, given_up, writable_l2

_MOST_ZEROES = 1 << 20
"""Bytes of zeroes that are written at a time."""


class Zeroer:
    """Discards and zeroes ranges of one image.

    Each method returns when the change is in the host's hands; what `resolve` said of the range
    before holds no longer.
    """

    def __init__(self, image: Image, writer: Writer) -> None:
        self._image = image
        self._writer = writer
        self._tables = image.tables
        self._unit = image.tables.subcluster_size

    def discard(self, offset: int, length: int) -> None:
        """Give up the whole units (clusters or subclusters) inside the range."""
        if self._image.header.raw_data_file:
            self._zero_data(offset, length, may_unmap=True)
            return
        start, stop = self._inner(offset, offset + length)
        if start < stop:
            self._each_cluster(start, stop, self._discard_cluster)
            self._image.settle()

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zeroes; `may_unmap`: rather free its clusters."""
        if self._image.header.raw_data_file:
            self._zero_data(offset, length, may_unmap=may_unmap)
            return
        end = offset + length
        start, stop = self._inner(offset, end)
        if self._tables.extended:
            start, stop = self._around_compressed(start, stop)
        if start >= stop or not self._can_say_zero():
            self._write_zeroes(offset, end)
            return
        self._write_zeroes(offset, start)
        change = self._free_cluster if may_unmap else self._zero_cluster
        self._each_cluster(start, stop, change)
        self._write_zeroes(stop, end)
        self._image.settle()

    def _zero_data(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """In a data file that is the disk by itself: the tables stay as they are.

        What they say is unallocated or zero is so there already.
        """
        image = self._image
        image.require_writable()
        with image.using():
            for piece in image.pieces(offset, length):
                if piece.kind is Kind.NORMAL:
                    image.data_host.zero(piece.host, piece.length, may_unmap=may_unmap)

    def _can_say_zero(self) -> bool:
        # Version 2 has no way to say so, but for what nothing lies behind.
        return self._image.header.version >= 3 or self._image.backing is None

    def _inner(self, start: int, stop: int) -> tuple[int, int]:
        """The whole units inside; the disk's end may cut the last one short."""
        unit = self._unit
        size = self._image.size
        return start + -start % unit, stop if stop == size else stop - stop % unit

    def _around_compressed(self, start: int, stop: int) -> tuple[int, int]:
        """Without the ends that are parts of compressed clusters: those have no subclusters."""
        cluster = self._tables.cluster_size
        for piece in self._image.pieces(start, 1 if start % cluster and start < stop else 0):
            if piece.kind is Kind.COMPRESSED:
                start += -start % cluster
        last = stop - stop % cluster
        inside = start < stop < self._image.size and stop % cluster
        for piece in self._image.pieces(last, 1 if inside else 0):
            if piece.kind is Kind.COMPRESSED:
                stop = last
        return start, stop

    def _write_zeroes(self, start: int, stop: int) -> None:
        """For what is no whole unit, and where zeroes can't be said: written, if need be."""
        requests = []
        for piece in self._image.pieces(start, max(stop - start, 0)):
            at, end = piece.offset, piece.offset + piece.length
            if piece.kind is Kind.ZERO or self._image.is_zero(at, end - at):
                continue
            while at < end:
                size = min(end - at, _MOST_ZEROES)
                requests.append(WriteRequest(at, [self._image.buffer(size)]))
                at += size
        for request in requests:
            self._writer.write([request])
            if request.error is not None:
                raise request.error

    def _each_cluster(
        self, start: int, stop: int, change: Callable[[array[int], int, int], None]
    ) -> None:
        """``change(L2 table, place, mask)`` for every cluster of the range, one table at a time.

        The mask has a bit for each subcluster concerned.
        """
        image, tables = self._image, self._tables
        reach = tables.l2_entries << tables.bits
        while start < stop:
            index = start // reach
            end = min(stop, (index + 1) * reach)
            with image.lock:
                first, last = start >> tables.bits, (end - 1) >> tables.bits
                while any(first <= number <= last for number in image.allocating):
                    image.unblocked.wait()
                image.require_writable()
                try:
                    if tables.l2_offset(index) or image.backing is not None:
                        self._change_table(index, start, end, change)
                except CorruptImage as error:
                    image.mark_corrupt(error)
                    raise
            start = end

    def _change_table(
        self, index: int, start: int, end: int, change: Callable[[array[int], int, int], None]
    ) -> None:
        tables = self._tables
        before = writable_l2(self._image, index)
        table = array("Q", before)
        cluster = tables.cluster_size
        while start < end:
            stop = min(end, start - start % cluster + cluster)
            first, last = start % cluster // self._unit, (stop - 1) % cluster // self._unit
            change(table, (start >> tables.bits) % tables.l2_entries, (2 << last) - (1 << first))
            start = stop
        width = 2 if tables.extended else 1
        words = [word for word, old in enumerate(before) if table[word] != old]
        changed = sorted({word // width for word in words})
        gone = list(self._given_up(before, table, changed))
        self._image.require_data(sorted(gone))
        try:
            self._image.remap(index, {word: table[word] for word in words})
        except DriverError:
            # Some of it may have been written; if it can't be read, nothing is given up.
            gone = []
            gone.extend(self._given_up(before, tables.l2(index) or before, changed))
            raise
        finally:
            self._image.refcounts.release(gone)

    def _given_up(
        self, before: array[int], after: array[int], places: Sequence[int]
    ) -> Iterator[int]:
        """Host clusters that these entries name no longer."""
        width = 2 if self._tables.extended else 1
        for place in places:
            old, new = before[place * width], after[place * width]
            yield from given_up(self._image, old, new)

    # -- one cluster --------------------------------------------------------------------------

    def _discard_cluster(self, table: array[int], place: int, mask: int) -> None:
        image = self._image
        if self._tables.extended:
            if table[2 * place] & COMPRESSED or self._said(table, place):
                self._zero_subclusters(table, place, mask, free=True)
        elif table[place] & COMPRESSED or self._tables.has_host(table[place]):
            # What lies behind must not show again: it may be what the guest wanted to forget.
            if image.backing is None and not self._external():
                table[place] = 0
            elif image.header.version >= 3:
                self._free_cluster(table, place, mask)

    def _said(self, table: array[int], place: int) -> bool:
        return bool(table[2 * place] or table[2 * place + 1])

    def _external(self) -> bool:
        return self._image.data_host is not self._image.host

    def _free_cluster(self, table: array[int], place: int, mask: int) -> None:
        """Zeroes, and no host cluster."""
        if self._tables.extended:
            self._zero_subclusters(table, place, mask, free=True)
        elif self._image.header.version < 3:
            table[place] = 0
        elif self._external() and self._tables.has_host(table[place]):
            table[place] |= ZERO
        elif table[place] or self._image.backing is not None:
            table[place] = ZERO

    def _zero_cluster(self, table: array[int], place: int, mask: int) -> None:
        """Zeroes, and the host cluster stays if it is the cluster's own."""
        if self._tables.extended:
            self._zero_subclusters(table, place, mask, free=False)
        elif (
            self._image.header.version >= 3
            and not table[place] & COMPRESSED
            and table[place] & COPIED
        ):
            table[place] |= ZERO
        else:
            self._free_cluster(table, place, mask)

    def _zero_subclusters(self, table: array[int], place: int, mask: int, *, free: bool) -> None:
        entry, bitmap = table[2 * place], table[2 * place + 1]
        if entry & COMPRESSED:
            if mask != 0xFFFF_FFFF:
                return  # a discard; `zero` does not ask for this
            entry, bitmap = 0, 0
        elif not entry and not bitmap and self._image.backing is None:
            return
        bitmap = (bitmap & ~mask) | mask << 32
        freeable = self._tables.has_host(entry) and not self._external()
        if bitmap == ALL_ZERO and freeable and (free or not entry & COPIED):
            entry = 0
        table[2 * place], table[2 * place + 1] = entry, bitmap
