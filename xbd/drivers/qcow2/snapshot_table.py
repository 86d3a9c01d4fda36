"""The table of internal snapshots, as bytes and as objects.

Source: QEMU's docs/interop/qcow2.rst, "Snapshots".
"""

from __future__ import annotations

import datetime
import struct
from collections.abc import Iterable
from typing import Final

import attrs

from xbd.core.driver import SnapshotInfo
from xbd.core.units import KIB
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQQ")
_WORD: Final = struct.Struct(">Q")

MAX_EXTRA_BYTES: Final = KIB
"""QEMU reads no more."""

LEAST_EXTRA_BYTES: Final = 16
"""What version 3 demands: up to the disk's size."""

_NO_ICOUNT: Final = (1 << 64) - 1
_FIRST_READ: Final = 64 * KIB
_PER_SNAPSHOT: Final = 256


def extra_data(*, vm_state_size: int, disk_size: int, icount: int | None = None) -> bytes:
    """What a new snapshot's entry says beyond version 2."""
    return _EXTRA.pack(vm_state_size, disk_size, _NO_ICOUNT if icount is None else icount)


@attrs.frozen(kw_only=True)
class Snapshot:
    """One entry of the table.  Sizes and offsets in bytes, `l1_size` in entries."""

    l1_table_offset: int
    l1_size: int
    id: str
    name: str
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    """How long the guest had run."""
    short_vm_state_size: int = 0
    """For readers that don't know the extra data."""
    extra_data: bytes = b""
    """All of it, also what is unknown here: kept as it is."""

    @property
    def vm_state_size(self) -> int:
        told = self._extra_word(0)
        return self.short_vm_state_size if told is None else told

    @property
    def disk_size(self) -> int | None:
        """When it was taken; None (only in version 2): as that of the disk."""
        return self._extra_word(8)

    @property
    def icount(self) -> int | None:
        """The guest's instructions until then, if they were counted."""
        told = self._extra_word(16)
        return None if told == _NO_ICOUNT else told

    def _extra_word(self, at: int) -> int | None:
        if len(self.extra_data) < at + _WORD.size:
            return None
        word: int = _WORD.unpack_from(self.extra_data, at)[0]
        return word

    def info(self, disk_size: int) -> SnapshotInfo:
        """For people; `disk_size`: the disk's now."""
        date = datetime.datetime.fromtimestamp(self.date_sec, datetime.UTC)
        return SnapshotInfo(
            id=self.id,
            name=self.name,
            size=disk_size if self.disk_size is None else self.disk_size,
            vm_state_size=self.vm_state_size,
            date=date.replace(microsecond=min(self.date_nsec // 1000, 999_999)),
            vm_clock_ns=self.vm_clock_nsec,
            icount=self.icount,
        )


@attrs.frozen(kw_only=True)
class SnapshotTable:
    """What could be read of a table."""

    snapshots: tuple[Snapshot, ...] = ()
    length: int = 0
    """Bytes that the entries occupy, with what lies between them."""
    excess: tuple[int, ...] = ()
    """Places of the snapshots that have more extra data than is allowed; it is cut here."""
    lost: int = 0
    """Snapshots at the end that are not read, because with them the table would be too large."""


class _Short(Exception):
    """The bytes end before the table does."""


def parse_snapshots(data: bytes | bytearray, count: int) -> SnapshotTable:
    """Take apart `count` entries, and tell of what is wrong with them.

    `data` is the whole table; what follows it does no harm.  Raises `CorruptImage` if it ends
    early.
    """
    try:
        return _parse(data, count)
    except _Short:
        raise CorruptImage("the snapshot table ends inside a snapshot") from None


def _parse(data: bytes | bytearray, count: int) -> SnapshotTable:
    snapshots: list[Snapshot] = []
    excess = []
    at = 0
    while len(snapshots) < count:
        begin = at + -at % 8
        if begin + _ENTRY.size > layout.MAX_SNAPSHOT_TABLE_BYTES:
            break
        if begin + _ENTRY.size > len(data):
            raise _Short
        (
            l1_table_offset,
            l1_size,
            id_length,
            name_length,
            date_sec,
            date_nsec,
            vm_clock_nsec,
            vm_state_size,
            extra_length,
        ) = _ENTRY.unpack_from(data, begin)
        extra_end = begin + _ENTRY.size + extra_length
        id_end = extra_end + id_length
        end = id_end + name_length
        if end > layout.MAX_SNAPSHOT_TABLE_BYTES:
            break
        if end > len(data):
            raise _Short
        if extra_length > MAX_EXTRA_BYTES:
            excess.append(len(snapshots))
        extra_at = begin + _ENTRY.size
        snapshots.append(
            Snapshot(
                l1_table_offset=l1_table_offset,
                l1_size=l1_size,
                id=_text(data[extra_end:id_end]),
                name=_text(data[id_end:end]),
                date_sec=date_sec,
                date_nsec=date_nsec,
                vm_clock_nsec=vm_clock_nsec,
                short_vm_state_size=vm_state_size,
                extra_data=bytes(data[extra_at : min(extra_end, extra_at + MAX_EXTRA_BYTES)]),
            )
        )
        at = end
    return SnapshotTable(
        snapshots=tuple(snapshots), length=at, excess=tuple(excess), lost=count - len(snapshots)
    )


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "surrogateescape")


def read_snapshots(host: Host, header: Header) -> SnapshotTable:
    """As `parse_snapshots`, from the image; behind the file's end there are zeroes.

    Reads 64 MiB at most.
    """
    if not header.nb_snapshots:
        return SnapshotTable()
    length = max(_FIRST_READ, header.nb_snapshots * _PER_SNAPSHOT)
    while True:
        length = min(length, layout.MAX_SNAPSHOT_TABLE_BYTES)
        try:
            return _parse(host.read(header.snapshots_offset, length), header.nb_snapshots)
        except _Short:
            length *= 2


def load_snapshots(host: Host, header: Header) -> tuple[Snapshot, ...]:
    """The snapshots of an image in which nothing may be wrong with them.

    Raises `CorruptImage` for a table that breaks a limit, or for a snapshot's L1 table that
    can't be.
    """
    table = read_snapshots(host, header)
    if table.lost:
        raise CorruptImage("the snapshot table is too large")
    if table.excess:
        raise CorruptImage(f"snapshot {table.excess[0]} has too much extra data")
    for number, snapshot in enumerate(table.snapshots):
        problem = l1_problem(snapshot, header)
        if problem:
            raise CorruptImage(f"snapshot {number}: {problem}")
    return table.snapshots


def l1_problem(snapshot: Snapshot, header: Header) -> str | None:
    """Why a snapshot's L1 table can't be where the entry says, if it can't."""
    offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
    if offset % header.cluster_size:
        return f"its L1 table at {offset:#x} begins inside a cluster"
    if length > layout.MAX_L1_BYTES:
        return f"its L1 table of {snapshot.l1_size} entries is larger than 32 MiB"
    if offset + length > 1 << 56 or (length and not offset):
        return f"its L1 table can't be at {offset:#x}"
    return None


def pack_snapshots(snapshots: Iterable[Snapshot]) -> bytes:
    """The table's bytes.  Raises `CorruptImage` for what readers would refuse."""
    packed = bytearray()
    for count, snapshot in enumerate(snapshots):
        name = snapshot.name.encode("utf-8", "surrogateescape")
        identifier = snapshot.id.encode("utf-8", "surrogateescape")
        if count >= layout.MAX_SNAPSHOTS:
            raise CorruptImage(f"an image can't have more than {layout.MAX_SNAPSHOTS} snapshots")
        if max(len(name), len(identifier)) > 0xFFFF:
            raise CorruptImage("a snapshot's name can't have more than 65535 bytes")
        if len(snapshot.extra_data) > MAX_EXTRA_BYTES:
            raise CorruptImage(f"snapshot {count} has too much extra data")
        packed += bytes(-len(packed) % 8)
        packed += _ENTRY.pack(
            snapshot.l1_table_offset,
            snapshot.l1_size,
            len(identifier),
            len(name),
            snapshot.date_sec,
            snapshot.date_nsec,
            snapshot.vm_clock_nsec,
            snapshot.short_vm_state_size,
            len(snapshot.extra_data),
        )
        packed += snapshot.extra_data + identifier + name
        if len(packed) > layout.MAX_SNAPSHOT_TABLE_BYTES:
            raise CorruptImage("the snapshot table would be larger than 64 MiB")
    return bytes(packed)
