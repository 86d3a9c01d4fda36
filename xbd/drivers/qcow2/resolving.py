"""Where a disk's bytes simply lie, or that they are zeroes, as far as tables in memory tell.

Without the image's lock and without I/O (`load` alone waits): for `BlockDevice.resolve` and such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import attrs

from xbd.core.driver import HostExtent
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.layout import COPIED
from xbd.drivers.qcow2.refcounts import LARGEST_OFFSET
from xbd.drivers.qcow2.tables import Kind, Piece

if TYPE_CHECKING:
    from xbd.drivers.qcow2.image import Image

ExtentT = TypeVar("ExtentT", HostExtent, HostExtent | None)

_NOT_PLAIN: Final = layout.COMPRESSED | layout.ZERO

MOST_EXTENTS: Final = 64
"""That one look at the tables finds: some 50 us where no cluster follows the one before it."""


class Resolver:
    """Looks at the tables of one image, and of those behind it."""

    def __init__(self, image: Image) -> None:
        self._image = image

    def resolve(self, offset: int, length: int, *, for_write: bool = False) -> HostExtent | None:
        """Where the first bytes of a range simply lie.

        Looks only at tables in memory, without the lock; each entry of the range costs time.
        """
        image = self._image
        piece = self._locate(offset, length, for_write=for_write)
        if piece is None:
            return None
        if piece.kind is Kind.UNALLOCATED:
            assert image.backing is not None
            return _shortened(image.backing.resolve(piece.offset, piece.length), piece.length)
        return HostExtent(fd=image.data_host.fd, offset=piece.host, length=piece.length)

    def resolve_all(self, offset: int, length: int, *, for_write: bool = False) -> list[HostExtent]:
        """As `resolve`, for as much of a range as simply lies somewhere, up to `MOST_EXTENTS`."""
        image = self._image
        extents: list[HostExtent] = []
        end = offset + length
        while offset < end and len(extents) < MOST_EXTENTS:
            if not for_write and (reach := self._scattered(offset, end, extents)) > offset:
                offset = reach
                continue
            piece = self._locate(offset, end - offset, for_write=for_write)
            if piece is None:
                break
            if piece.kind is Kind.UNALLOCATED:
                assert image.backing is not None
                found = image.backing.resolve_all(piece.offset, piece.length)
            else:
                found = [HostExtent(fd=image.data_host.fd, offset=piece.host, length=piece.length)]
            found = found[: MOST_EXTENTS - len(extents)]
            reach = sum(extent.length for extent in found)
            if reach > piece.length:
                found[-1] = _shortened(found[-1], found[-1].length - (reach - piece.length))
            for extent in found:
                _append(extents, extent)
            offset += min(reach, piece.length)
            if reach < piece.length:
                break
        return extents

    def zeroes(self, offset: int, length: int) -> int:
        """How much of a range reads as zeroes for sure, from its beginning on.  Behind the disk
        there are zeroes.  Looks only at tables in memory."""
        at, end = offset, offset + length
        try:
            while at < min(end, self._image.size):
                reach = self._zero_reach(at, min(end, self._image.size) - at)
                if not reach:
                    return at - offset
                at += reach
        except CorruptImage:
            return at - offset  # reading it says what is wrong
        return length

    def _zero_reach(self, offset: int, length: int) -> int:
        """As `zeroes`, of the first piece of what lies inside the disk."""
        piece = None
        if not self._image.tables.extended:
            piece = self._run(offset, length, holes=True)
        if piece is None:
            piece = next(self._image.tables.pieces(offset, length, wait=False), None)
        if piece is None or piece.kind not in (Kind.ZERO, Kind.UNALLOCATED):
            return 0
        if piece.kind is Kind.UNALLOCATED and self._image.backing is not None:
            return self._image.backing.zeroes(piece.offset, piece.length)
        return piece.length

    def _scattered(self, offset: int, end: int, extents: list[HostExtent]) -> int:
        """Clusters that lie anywhere, for reading: as `_run`, but many at a time.  How far."""
        tables, size = self._image.tables, self._image.tables.cluster_size
        if tables.extended or self._image.cipher is not None or offset % size:
            return offset
        index, place = divmod(offset >> tables.bits, tables.l2_entries)
        try:
            table = tables.cached(index)
        except CorruptImage:
            table = None
        if table is None:
            return offset
        fd, most = self._image.data_host.fd, LARGEST_OFFSET - size
        whole = min(end, self._image.size) - offset >> tables.bits
        start = following = 0
        for entry in table[place : place + whole]:
            host = entry & layout.OFFSET_MASK
            if not host or entry & _NOT_PLAIN or host & size - 1 or host > most:
                break
            if host != following:
                if following:
                    _append(extents, HostExtent(fd=fd, offset=start, length=following - start))
                    if len(extents) == MOST_EXTENTS:
                        return offset
                start = host
            following = host + size
            offset += size
        if following:
            _append(extents, HostExtent(fd=fd, offset=start, length=following - start))
        return offset

    def in_memory(self, offset: int, length: int) -> bool:
        """Whether `resolve` and `zeroes` know all they can of a range.  No I/O."""
        end = min(offset + length, self._image.size)
        for piece in self._image.tables.pieces(offset, end - offset, wait=False):
            offset += piece.length
            behind = self._image.backing if piece.kind is Kind.UNALLOCATED else None
            if behind is not None and not behind.in_memory(piece.offset, piece.length):
                return False
        return offset >= end

    def load(self, offset: int, length: int) -> None:
        """Have it so: see `in_memory`."""
        for piece in self._image.pieces(offset, min(length, self._image.size - offset)):
            if piece.kind is Kind.UNALLOCATED and self._image.backing is not None:
                self._image.backing.load(piece.offset, piece.length)

    def simply_lies(self, offset: int, length: int) -> bool:
        """Whether all of a range lies somewhere or reads as zeroes, as far as is in memory."""
        end = offset + length
        while offset < end:
            found = sum(extent.length for extent in self.resolve_all(offset, end - offset))
            found = found or self.zeroes(offset, end - offset)
            if not found:
                return False
            offset += found
        return True

    def _locate(self, offset: int, length: int, *, for_write: bool) -> Piece | None:
        """The piece at `offset`, if it simply lies somewhere: here, or behind this image."""
        if for_write and (not self._image.writable or self._image.broken is not None):
            return None
        if self._image.cipher is not None:
            return None
        try:
            return self._locate_piece(offset, length, for_write=for_write)
        except CorruptImage:
            return None  # the slow way says what is wrong

    def _locate_piece(self, offset: int, length: int, *, for_write: bool) -> Piece | None:
        image, tables = self._image, self._image.tables
        cluster = tables.cluster_size
        length = min(length, image.size - offset)
        if length <= 0:
            return None
        if tables.extended:
            piece = next(tables.pieces(offset, length, wait=False), None)
        else:
            piece = self._run(offset, length, holes=image.backing is not None and not for_write)
        if piece is None or piece.length <= 0:
            return None
        if piece.kind is Kind.UNALLOCATED and image.backing is not None and not for_write:
            return piece
        if piece.kind is not Kind.NORMAL or (for_write and not piece.writable):
            return None
        end = piece.host + piece.length
        if end > LARGEST_OFFSET:
            return None
        if for_write and image.data_host is image.host:
            first = piece.host // cluster
            last = -(-end // cluster)
            if last > image.refcounts.end or image.metadata.overlaps(first, last - first):
                return None
        if for_write and image.moved is not None:
            first = offset // cluster
            stop = image.moved.first(first, -(-(offset + piece.length) // cluster))
            if stop == first:
                return None
            length = min(piece.length, stop * cluster - offset)
            piece = attrs.evolve(piece, length=length)
        return piece

    def _run(self, offset: int, length: int, *, holes: bool) -> Piece | None:
        """The piece at `offset`, of entries without subclusters: as `Tables.pieces`, but fast.

        `holes`: unallocated ones too.
        """
        tables = self._image.tables
        bits, entries = tables.bits, tables.l2_entries
        index, place = divmod(offset >> bits, entries)
        base = index * entries
        last = min(entries, (offset + length - 1 >> bits) - base + 1)
        table = tables.cached(index)
        if table is None:
            if tables.l2_offset(index) or not holes:
                return None
            stop = min((base + entries) << bits, offset + length)
            return Piece(Kind.UNALLOCATED, offset, stop - offset)
        entry = table[place]
        if entry & (layout.COMPRESSED | layout.ZERO):
            return None
        if not tables.has_host(entry):
            if not holes:
                return None
            same = table[place:last].tobytes()
            place += (len(same) - len(same.lstrip(b"\0"))) // 8 or 1
            stop = min((base + place) << bits, offset + length)
            return Piece(Kind.UNALLOCATED, offset, stop - offset)
        host = tables.host_offset(entry) + (offset & tables.cluster_size - 1)
        step = tables.cluster_size
        writable = bool(entry & tables.l1[index] & COPIED)
        place += 1
        while place < last and table[place] == entry + step:
            entry += step
            place += 1
        stop = min((base + place) << bits, offset + length)
        return Piece(Kind.NORMAL, offset, stop - offset, host, writable)


def _append(extents: list[HostExtent], more: HostExtent) -> None:
    last = extents[-1] if extents else None
    if last is not None and last.fd == more.fd and last.offset + last.length == more.offset:
        extents[-1] = attrs.evolve(last, length=last.length + more.length)
    else:
        extents.append(more)


def _shortened(extent: ExtentT, length: int) -> ExtentT:
    if extent is None or extent.length <= length:
        return extent
    return attrs.evolve(extent, length=length)
