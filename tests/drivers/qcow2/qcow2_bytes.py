"""A second opinion on qcow2 images, in memory: what is wrong, and what the disk reads as.

Shares no code with the driver, and does no more than the tests need.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator

import attrs

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_LUKS_EXTENSION = 0x0537BE77
_BITMAPS_EXTENSION = 0x23852875


class Wrong(AssertionError):
    """The image is not what it should be."""


def _words(data: bytes | bytearray, offset: int, count: int) -> array[int]:
    part = bytes(data[offset : offset + 8 * count])
    words = array("Q", part + bytes(8 * count - len(part)))
    if sys.byteorder == "little":
        words.byteswap()
    return words


@attrs.define
class Snapshot:
    name: str
    l1: array[int]
    l1_at: int
    size: int


class ImageBytes:
    """An image in memory."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        (magic, self.version, backing_at, backing_length, self.bits, self.size) = (
            struct.unpack_from(">IIQIIQ", data)
        )
        if magic != 0x514649FB or self.version not in (2, 3):
            raise Wrong("the header is gone")
        (l1_size, self.l1_at, self.table_at, self.table_clusters, self.snapshots, self.list_at) = (
            struct.unpack_from(">IQQIIQ", data, 36)
        )
        self.backing = bytes(data[backing_at : backing_at + backing_length]).decode()
        self.incompatible, self.autoclear, self.order, self.header_length = 0, 0, 4, 72
        if self.version == 3:
            self.incompatible, _, self.autoclear = struct.unpack_from(">QQQ", data, 72)
            self.order, self.header_length = struct.unpack_from(">II", data, 96)
        self.zstd = self.header_length > 104 and data[104] == 1
        self.cluster = 1 << self.bits
        self.external = bool(self.incompatible & 4)
        self.extended = bool(self.incompatible & 16)
        self.entries = self.cluster // (16 if self.extended else 8)
        self.l1 = _words(data, self.l1_at, l1_size)

    # -- checking -----------------------------------------------------------------------------

    def counts(self) -> dict[int, int]:
        """The use counts that are not 0."""
        found = {}
        bits = 1 << self.order
        per_block = self.cluster * 8 // bits
        mask = (1 << bits) - 1
        table = _words(self.data, self.table_at, self.table_clusters * self.cluster // 8)
        for number, at in enumerate(table):
            if not at:
                continue
            if at % self.cluster:
                raise Wrong(f"refcount block {number} lies at {at:#x}")
            block = bytes(self.data[at : at + self.cluster]).rstrip(b"\0")
            first = number * per_block
            if bits >= 8:
                code, width = {8: "B", 16: "H", 32: "I", 64: "Q"}[bits], bits // 8
                block += bytes(-len(block) % width)
                for place, (count,) in enumerate(struct.iter_unpack(f">{code}", block)):
                    if count:
                        found[first + place] = count
            else:
                for place, byte in enumerate(block):
                    for part in range(8 // bits):
                        count = byte >> part * bits & mask
                        if count:
                            found[first + place * (8 // bits) + part] = count
        return found

    def snapshot_list(self) -> Iterator[Snapshot]:
        at = self.list_at
        for _ in range(self.snapshots):
            l1_at, l1_size, id_length, name_length = struct.unpack_from(">QIHH", self.data, at)
            (extra,) = struct.unpack_from(">I", self.data, at + 36)
            size = self.size
            if extra >= 16:
                (size,) = struct.unpack_from(">Q", self.data, at + 48)
            end = at + 40 + extra + id_length + name_length
            name = bytes(self.data[end - name_length : end]).decode()
            yield Snapshot(name, _words(self.data, l1_at, l1_size), l1_at, size)
            at = end + -end % 8
        self.list_end = at

    @property
    def dirty(self) -> bool:
        """Counts and COPIED flags may be wrong, and are put right when it is opened."""
        return bool(self.incompatible & 1)

    def check(self, *, strict: bool = True) -> int:
        """Raise `Wrong` for a corruption; returns how many clusters are leaked.

        Not `strict`: a cluster that one thing alone uses may be counted more often, COPIED or not.
        """
        if self.incompatible & 2:
            raise Wrong("it is marked as corrupt")
        counts = self.counts()
        uses: Counter[int] = Counter()
        single: Counter[int] = Counter()
        """Clusters that one thing alone may use, at least in the active tables."""

        def use(what: str, at: int, length: int) -> None:
            if at % self.cluster:
                raise Wrong(f"{what} lies at {at:#x}")
            for cluster in range(at >> self.bits, -(-(at + length) >> self.bits)):
                uses[cluster] += 1
                single[cluster] += 1

        use("the header", 0, 1)
        use("the L1 table", self.l1_at, len(self.l1) * 8)
        use("the refcount table", self.table_at, self.table_clusters * self.cluster)
        for at in _words(self.data, self.table_at, self.table_clusters * self.cluster // 8):
            if at:
                use("a refcount block", at, 1)
        luks = self._luks()
        if luks:
            use("the LUKS area", *luks)
        shots = list(self.snapshot_list())
        if shots:
            use("the snapshot table", self.list_at, self.list_end - self.list_at)
        for shot in shots:
            use("a snapshot's L1 table", shot.l1_at, len(shot.l1) * 8)
            for _ in self._count_tables(shot.l1, uses):
                pass
        for entry, kind in list(self._count_tables(self.l1, uses)):
            if entry & _COMPRESSED:
                if entry & _COPIED:
                    raise Wrong(f"{kind} {entry:#x}: a compressed cluster is not COPIED")
                continue
            cluster = (entry & _OFFSET) >> self.bits
            single[cluster] += 1
            copied = bool(entry & _COPIED)
            if copied and uses[cluster] > 1:
                raise Wrong(f"{kind} {entry:#x}: it is used {uses[cluster]} times")
            if strict and copied != (counts.get(cluster, 0) == 1):
                raise Wrong(f"{kind} {entry:#x}: the count is {counts.get(cluster, 0)}")
        for cluster, number in single.items():
            if number > 1:
                raise Wrong(f"host cluster {cluster} is used for {number} things")
        end = -(-len(self.data) // self.cluster)
        for cluster, number in uses.items():
            if cluster >= end:
                raise Wrong(f"host cluster {cluster} is used, the file ends with {end - 1}")
            if counts.get(cluster, 0) < number:
                raise Wrong(
                    f"host cluster {cluster} is used {number} times, "
                    f"its count is {counts.get(cluster, 0)}"
                )
        return sum(count > uses[cluster] for cluster, count in counts.items())

    def _luks(self) -> tuple[int, int] | None:
        at = self._extension(_LUKS_EXTENSION)
        return None if at is None else struct.unpack_from(">QQ", self.data, at)

    def _extension(self, wanted: int) -> int | None:
        """Where a header extension's data begins."""
        at = self.header_length
        while self.version == 3 and at + 8 <= self.cluster:
            kind, length = struct.unpack_from(">II", self.data, at)
            if kind == wanted:
                return at + 8
            if kind == 0:
                break
            at += 8 + length + -length % 8
        return None

    def has_valid_bitmap(self) -> bool:
        """Whether a bitmap (the first, and there are no others) claims to know of all writes."""
        at = self._extension(_BITMAPS_EXTENSION)
        if at is None or not self.autoclear & 1:
            return False
        (directory,) = struct.unpack_from(">Q", self.data, at + 16)
        (flags,) = struct.unpack_from(">I", self.data, directory + 12)
        return not flags & 1

    def _count_tables(self, l1: array[int], uses: Counter[int]) -> Iterator[tuple[int, str]]:
        """Count what the tables name, and tell each L1 and L2 entry that names something."""
        for entry in l1:
            if not entry:
                continue
            at = entry & _OFFSET
            if at % self.cluster:
                raise Wrong(f"L1 entry {entry:#x} is misaligned")
            uses[at >> self.bits] += 1
            yield entry, "L1 entry"
            for l2, _ in self._l2(at):
                if l2 & _COMPRESSED:
                    first, length = self._compressed_place(l2)
                    for cluster in range(first >> self.bits, (first + length - 1 >> self.bits) + 1):
                        uses[cluster] += 1
                    yield l2, "L2 entry"
                elif l2 & _OFFSET and not self.external:
                    if (l2 & _OFFSET) % self.cluster:
                        raise Wrong(f"L2 entry {l2:#x} is misaligned")
                    uses[(l2 & _OFFSET) >> self.bits] += 1
                    yield l2, "L2 entry"

    def _l2(self, at: int) -> Iterator[tuple[int, int]]:
        """Entries with their bitmaps, up to the last that is not zero."""
        used = len(bytes(self.data[at : at + self.cluster]).rstrip(b"\0"))
        words = _words(self.data, at, -(-used // 16) * 2)
        if self.extended:
            return zip(words[::2], words[1::2], strict=True)
        return ((word, 0) for word in words)

    def _compressed_place(self, entry: int) -> tuple[int, int]:
        shift = 70 - self.bits
        offset = entry & (1 << shift) - 1
        sectors = (entry & _COMPRESSED - 1) >> shift
        return offset, (sectors + 1) * 512 - offset % 512

    # -- reading ------------------------------------------------------------------------------

    def disk(
        self,
        below: bytes | bytearray = b"",
        data_file: bytes | bytearray | None = None,
        snapshot: Snapshot | None = None,
    ) -> bytearray:
        """All of the disk (or of a snapshot); `below` lies behind it."""
        size, l1 = self.size, self.l1
        if snapshot is not None:
            size, l1 = snapshot.size, snapshot.l1
        data = self.data if data_file is None else data_file
        whole = -(-size // self.cluster) * self.cluster
        disk = bytearray(below[:size]).ljust(whole, b"\0")
        for index, l1_entry in enumerate(l1):
            at = index * self.entries << self.bits
            if at >= size:
                break
            if not l1_entry & _OFFSET:
                continue
            for entry, bitmap in self._l2(l1_entry & _OFFSET):
                if at >= size:
                    break
                if entry or bitmap:
                    self._cluster(disk, at, entry, bitmap, data)
                at += self.cluster
        del disk[size:]
        return disk

    def _cluster(
        self, disk: bytearray, at: int, entry: int, bitmap: int, data: bytes | bytearray
    ) -> None:
        end = at + self.cluster
        host = entry & _OFFSET
        if entry & _COMPRESSED:
            offset, length = self._compressed_place(entry)
            packed = bytes(self.data[offset : offset + length])
            if self.zstd:
                import zstandard

                unpacker = zstandard.ZstdDecompressor().decompressobj()
                disk[at:end] = unpacker.decompress(packed)
            else:
                disk[at:end] = zlib.decompressobj(-12).decompress(packed, self.cluster)
        elif self.extended:
            unit = self.cluster // 32
            if bitmap & bitmap >> 32 & 0xFFFF_FFFF:
                raise Wrong(f"L2 entry {entry:#x} has the bitmap {bitmap:#x}")
            for number in range(32):
                part = slice(at + number * unit, at + (number + 1) * unit)
                if bitmap >> 32 + number & 1:
                    disk[part] = bytes(unit)
                elif bitmap >> number & 1:
                    if not host and not self.external:
                        raise Wrong(f"subclusters {bitmap:#x} are allocated nowhere")
                    disk[part] = _at(data, host + number * unit, unit)
        elif entry & 1:
            disk[at:end] = bytes(self.cluster)
        elif host or (self.external and entry & _COPIED):
            disk[at:end] = _at(data, host, self.cluster)


def _at(data: bytes | bytearray, offset: int, length: int) -> bytes:
    return bytes(data[offset : offset + length]).ljust(length, b"\0")
