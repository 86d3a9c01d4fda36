"""``xbd image map``: which image of a chain says what the disk reads as, and where its bytes lie.

Source: QEMU's docs/interop/qcow2.rst, "Cluster mapping"; the entries are those of ``qemu-img map
--output=json``, except that the host's holes in a qcow2 file are not looked for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from xbd.core.driver import MapEntry
from xbd.core.hostio.failures import shown
from xbd.core.units import MIB
from xbd.drivers.qcow2.chain import RawBacking, open_backing
from xbd.drivers.qcow2.confined import named_path
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.image import Backing, Image
from xbd.drivers.qcow2.layout import COMPRESSED, SUBCLUSTERS, ZERO, CryptMethod
from xbd.drivers.qcow2.offline import opened_file, read_header
from xbd.drivers.qcow2.sparse import used_entries
from xbd.drivers.qcow2.tables import Tables

_CACHE_BYTES: Final = MIB


class _Kind(enum.Enum):
    UNALLOCATED = enum.auto()
    """What lies behind shows through."""
    ZERO = enum.auto()
    DATA = enum.auto()
    COMPRESSED = enum.auto()


@attrs.frozen
class _Piece:
    """A range that is all of one kind, and lies in one piece if it lies somewhere."""

    kind: _Kind
    start: int
    end: int
    offset: int | None
    """In the layer's file."""


@attrs.frozen(kw_only=True)
class _Layer:
    """An image of the chain."""

    file: Path
    """Where its data lie."""
    size: int
    source: Tables | RawBacking
    encrypted: bool = False

    def pieces(self, start: int, end: int) -> Iterator[_Piece]:
        """What a range of the image is; neighbours of a kind are joined."""
        last: _Piece | None = None
        for piece in self._small_pieces(start, end):
            if last is not None and _continues(last, piece):
                last = _Piece(last.kind, last.start, piece.end, last.offset)
            else:
                if last is not None:
                    yield last
                last = piece
        if last is not None:
            yield last

    def _small_pieces(self, start: int, end: int) -> Iterator[_Piece]:
        if isinstance(self.source, RawBacking):
            for length, zero in self.source.status(start, end - start):
                yield _Piece(_Kind.ZERO if zero else _Kind.DATA, start, start + length, start)
                start += length
        else:
            yield from self._mapped(self.source, start, end)

    def _mapped(self, tables: Tables, start: int, end: int) -> Iterator[_Piece]:
        per_table = tables.l2_entries << tables.bits
        step = 2 if tables.extended else 1
        while start < end:
            index = start // per_table
            stop = min(end, (index + 1) * per_table)
            table = tables.l2(index)
            if table is None:
                used, _ = next(used_entries(tables.l1, index + 1), (end, 0))
                stop = min(end, used * per_table)
                yield _Piece(_Kind.UNALLOCATED, start, stop, None)
                start = stop
                continue
            place = (start % per_table >> tables.bits) * step
            while start < stop:
                limit = min(stop, (start | tables.cluster_size - 1) + 1)
                bitmap = table[place + 1] if tables.extended else 0
                yield from self._cluster(tables, table[place], bitmap, start, limit)
                start = limit
                place += step

    def _cluster(
        self, tables: Tables, entry: int, bitmap: int, start: int, end: int
    ) -> Iterator[_Piece]:
        if entry & COMPRESSED:
            yield _Piece(_Kind.COMPRESSED, start, end, None)
            return
        offset = None
        allocated = tables.has_host(entry)
        if allocated:
            within = start % tables.cluster_size
            offset = None if self.encrypted else tables.host_offset(entry) + within
        if not tables.extended:
            kind = _Kind.DATA if allocated else _Kind.UNALLOCATED
            yield _Piece(_Kind.ZERO if entry & ZERO else kind, start, end, offset)
            return
        tables.check_bitmap(entry, bitmap)
        first, unit = start, tables.cluster_size // SUBCLUSTERS
        while start < end:
            number = start % tables.cluster_size // unit
            stop = min(end, start - start % unit + unit)
            kind = _Kind.DATA if bitmap >> number & 1 else _Kind.UNALLOCATED
            at = None if offset is None else offset + start - first
            yield _Piece(_Kind.ZERO if bitmap >> 32 + number & 1 else kind, start, stop, at)
            start = stop


def map_image(
    path: Path, *, image_dirs: Sequence[Path] | None = None, share: bool = False
) -> Iterator[MapEntry]:
    """The whole disk, from its beginning on.

    `image_dirs`: where what the image names may lie; None: anywhere.  `share`: even while somebody
    writes to it.  Raises `OpenFailed`, and `CorruptImage` where a table makes no sense.
    """
    with opened_file(path, writable=False, share=share) as host:
        header = read_header(host)
        backing = open_backing(host, header, _image, image_dirs=image_dirs, lock=not share)
        try:
            layers = [_layer(host, header, Tables(host, header, _CACHE_BYTES))]
            layers += _layers_behind(layers[0], header, host, backing)
            yield from _joined(_entries(layers, 0, 0, header.size))
        finally:
            if backing is not None:
                backing.close()


def _image(host: Host, header: Header, backing: Backing | None) -> Backing:
    """Nothing is read from it, so it needs neither key nor data file."""
    return Image(host, header, writable=False, backing=backing, cache_bytes=_CACHE_BYTES)


def _layer(host: Host, header: Header, tables: Tables) -> _Layer:
    file = host.path
    if header.has_data_file and header.data_file is not None:
        file = named_path(header.data_file, host.path.parent, f"{shown(host.path)}: the data file")
    return _Layer(
        file=file,
        size=header.size,
        source=tables,
        encrypted=header.crypt_method is not CryptMethod.NONE,
    )


def _layers_behind(
    above: _Layer, header: Header, host: Host, backing: Backing | None
) -> Iterator[_Layer]:
    while backing is not None:
        if isinstance(backing, RawBacking):
            what = f"{shown(host.path)}: the backing file"
            file = named_path(header.backing_file or "", host.path.parent, what)
            yield _Layer(file=file, size=backing.size, source=backing)
        if not isinstance(backing, Image):
            return
        host, header = backing.host, backing.header
        yield _layer(host, header, backing.tables)
        backing = backing.backing


def _entries(layers: Sequence[_Layer], depth: int, start: int, end: int) -> Iterator[MapEntry]:
    layer = layers[depth]
    for piece in layer.pieces(start, end):
        at = piece.start
        if piece.kind is _Kind.UNALLOCATED and depth + 1 < len(layers):
            inside = min(piece.end, layers[depth + 1].size)
            if at < inside:
                yield from _entries(layers, depth + 1, at, inside)
                at = inside
        if at < piece.end:
            offset = None if piece.offset is None else piece.offset + at - piece.start
            yield MapEntry(
                start=at,
                length=piece.end - at,
                depth=depth,
                present=piece.kind is not _Kind.UNALLOCATED,
                zero=piece.kind in (_Kind.UNALLOCATED, _Kind.ZERO),
                data=piece.kind in (_Kind.DATA, _Kind.COMPRESSED),
                compressed=piece.kind is _Kind.COMPRESSED,
                file=layer.file,
                offset=offset,
            )


def _joined(entries: Iterator[MapEntry]) -> Iterator[MapEntry]:
    last: MapEntry | None = None
    for entry in entries:
        if last is not None and _follows(last, entry):
            last = attrs.evolve(last, length=last.length + entry.length)
        else:
            if last is not None:
                yield last
            last = entry
    if last is not None:
        yield last


def _follows(last: MapEntry, entry: MapEntry) -> bool:
    expected = None if last.offset is None else last.offset + last.length
    return entry == attrs.evolve(last, start=entry.start, length=entry.length, offset=expected)


def _continues(last: _Piece, piece: _Piece) -> bool:
    if last.kind is not piece.kind:
        return False
    if last.offset is None or piece.offset is None:
        return last.offset is piece.offset
    return last.offset + last.end - last.start == piece.offset
