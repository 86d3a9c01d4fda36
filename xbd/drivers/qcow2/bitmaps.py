"""Persistent dirty bitmaps: where they lie, and which of them end with the first write.

Source: QEMU's docs/interop/qcow2.rst, "Bitmaps extension" and "Bitmaps".

Nothing is recorded in them.  Those that should follow every write are marked ``in_use`` instead,
which is how the specification tells that a bitmap may have missed something; the others stay
what they are.
"""

from __future__ import annotations

import enum
import struct
import sys
from array import array
from typing import Final

import attrs

from xbd.core.units import MIB
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import Autoclear, ExtensionType

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")
_FLAGS_AT: Final = 12
_DIRTY_TRACKING: Final = 1
_ALL_ONES: Final = 1
_TABLE_RESERVED: Final = 0xFF00_0000_0000_01FE

# What QEMU refuses to load.
MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31
MAX_NAME_BYTES: Final = 1023
MAX_BITMAP_BYTES: Final = 512 * MIB


class BitmapFlag(enum.IntFlag):
    """Structure of a bitmap directory entry, "flags"."""

    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


_KNOWN_FLAGS: Final = sum(BitmapFlag)


@attrs.frozen(kw_only=True)
class Directory:
    """The bitmaps extension: how many bitmaps, and where their directory lies, in bytes."""

    nb_bitmaps: int
    size: int
    offset: int


@attrs.frozen(kw_only=True)
class Bitmap:
    """An entry of the directory."""

    table_offset: int
    table_size: int
    """In entries of 8 bytes; each stands for a cluster of bits."""
    flags: BitmapFlag
    granularity_bits: int
    name: str
    extra_data: bytes
    entry_at: int
    """Where the entry begins in the directory, in bytes."""

    @property
    def granularity(self) -> int:
        """Bytes of the disk for which a bit stands."""
        return 1 << self.granularity_bits


def directory_of(header: Header) -> Directory | None:
    """None: the image has no bitmaps, or somebody changed it who did not care for them.

    Raises `CorruptImage`.
    """
    data = header.extension(ExtensionType.BITMAPS)
    if not header.autoclear & Autoclear.BITMAPS:
        return None
    if data is None:
        raise CorruptImage("it should have bitmaps, and says nowhere where")
    _require(len(data) == _EXTENSION.size, f"a bitmaps extension of {len(data)} bytes")
    number, reserved, size, offset = _EXTENSION.unpack(data)
    _require(reserved == 0, "the bitmaps extension's reserved field is not zero")
    _require(0 < number <= layout.MAX_BITMAPS, f"it has {number} bitmaps")
    _require(
        number * _ENTRY.size <= size <= layout.MAX_BITMAP_DIRECTORY_BYTES,
        f"a directory of {size} bytes for {number} bitmaps",
    )
    _require(_can_begin_at(offset, size, header), f"the bitmap directory can't be at {offset:#x}")
    return Directory(nb_bitmaps=number, size=size, offset=offset)


def parse_directory(data: bytes | bytearray, number: int, header: Header) -> tuple[Bitmap, ...]:
    """Take apart a directory of `number` entries, which `data` is exactly.

    Raises `CorruptImage` for what breaks the specification or one of QEMU's limits.
    """
    bitmaps: list[Bitmap] = []
    names = set()
    at = 0
    while at < len(data):
        _require(len(bitmaps) < number, f"there are more bitmaps than {number}")
        _require(at + _ENTRY.size <= len(data), "the bitmap directory ends inside an entry")
        (
            table_offset,
            table_size,
            flags,
            kind,
            granularity_bits,
            name_length,
            extra_length,
        ) = _ENTRY.unpack_from(data, at)
        name_at = at + _ENTRY.size + extra_length
        end = name_at + name_length
        _require(end + -end % 8 <= len(data), "the bitmap directory ends inside an entry")
        _require(0 < name_length <= MAX_NAME_BYTES, f"a bitmap's name of {name_length} bytes")
        name = bytes(data[name_at:end])
        told = ascii(name.decode("utf-8", "replace"))
        _require(name not in names, f"two bitmaps are called {told}")
        names.add(name)
        _require(kind == _DIRTY_TRACKING, f"bitmap {told} is of the unknown type {kind}")
        _require(not flags & ~_KNOWN_FLAGS, f"bitmap {told} has unknown flags ({flags:#x})")
        _require(
            MIN_GRANULARITY_BITS <= granularity_bits <= MAX_GRANULARITY_BITS,
            f"bitmap {told} has a granularity of 2^{granularity_bits} bytes",
        )
        length = table_size * header.cluster_size
        _require(
            0 < length <= MAX_BITMAP_BYTES and _can_begin_at(table_offset, table_size * 8, header),
            f"bitmap {told} has a table of {table_size} entries at {table_offset:#x}",
        )
        _require(
            bool(flags & BitmapFlag.IN_USE) or header.size <= length * 8 << granularity_bits,
            f"bitmap {told} is too short for the disk",
        )
        bitmaps.append(
            Bitmap(
                table_offset=table_offset,
                table_size=table_size,
                flags=BitmapFlag(flags),
                granularity_bits=granularity_bits,
                name=name.decode("utf-8", "surrogateescape"),
                extra_data=bytes(data[at + _ENTRY.size : name_at]),
                entry_at=at,
            )
        )
        at = end + -end % 8
    _require(len(bitmaps) == number, f"there are {len(bitmaps)} bitmaps instead of {number}")
    return tuple(bitmaps)


def load_bitmaps(host: Host, header: Header) -> tuple[Bitmap, ...]:
    """An image's bitmaps; none if they are not consistent.  Raises `CorruptImage`."""
    directory = directory_of(header)
    if directory is None:
        return ()
    _require(
        directory.offset + directory.size < host.size() + header.cluster_size,
        "the bitmap directory lies behind the file's end",
    )
    data = host.read(directory.offset, directory.size)
    return parse_directory(data, directory.nb_bitmaps, header)


def bitmap_data(host: Host, header: Header, bitmap: Bitmap) -> array[int]:
    """Offsets of the host clusters that hold a bitmap's bits.  Raises `CorruptImage`."""
    length = bitmap.table_size * 8
    _require(
        bitmap.table_offset + length < host.size() + header.cluster_size,
        "a bitmap's table lies behind the file's end",
    )
    table = array("Q", bytes(host.read(bitmap.table_offset, length)))
    if sys.byteorder == "little":
        table.byteswap()
    offsets = array("Q")
    for entry in table:
        offset = entry & layout.OFFSET_MASK
        _require(
            not entry & _TABLE_RESERVED
            and not offset % header.cluster_size
            and not (offset and entry & _ALL_ONES),
            f"a bitmap table has the entry {entry:#x}",
        )
        if offset:
            offsets.append(offset)
    return offsets


def mark_in_use(host: Host, header: Header) -> None:
    """Durably say of every bitmap which should follow all writes that it does not.

    To be called before the first change of the disk.  Raises `CorruptImage`.
    """
    directory = directory_of(header)
    if directory is None:
        return
    changed = False
    for bitmap in load_bitmaps(host, header):
        if bitmap.flags & BitmapFlag.AUTO and not bitmap.flags & BitmapFlag.IN_USE:
            flags = bitmap.flags | BitmapFlag.IN_USE
            # Four aligned bytes, which no crash tears apart.
            host.write(directory.offset + bitmap.entry_at + _FLAGS_AT, flags.to_bytes(4, "big"))
            changed = True
    if changed:
        host.flush()


def _can_begin_at(offset: int, length: int, header: Header) -> bool:
    return offset > 0 and offset % header.cluster_size == 0 and offset + length < 1 << 56


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CorruptImage(problem)
