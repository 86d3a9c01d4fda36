"""L1 and L2 tables: what lies behind each cluster of the disk.

Source: QEMU's docs/interop/qcow2.rst, "Cluster mapping".

Tables in memory are never ahead of those in the host's hands: what is not written is not known
here, and what the host refused to write is forgotten.
"""

from __future__ import annotations

import enum
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import attrs

from xbd.core.driver import Claims, DriverError
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, ZERO

_SWAP: Final = sys.byteorder == "little"

SECTOR_WORDS: Final = 64
"""Words of 8 bytes in a sector: the least that is written of a table."""


class Kind(enum.Enum):
    """What a cluster or subcluster reads as."""

    UNALLOCATED = "unallocated"
    """As the backing file, or zeroes."""
    ZERO = "zero"
    NORMAL = "normal"
    COMPRESSED = "compressed"


@attrs.frozen
class Piece:
    """A range of the disk that is all of one kind."""

    kind: Kind
    offset: int
    length: int
    host: int = 0
    """Where a NORMAL piece lies in the data file; the L2 entry of a COMPRESSED one."""
    writable: bool = False
    """Of a NORMAL piece: nobody else uses its cluster."""


def load_table(host: Host, offset: int, words: int) -> array[int]:
    """A table of 64-bit numbers, from big-endian to the machine's order."""
    table = array("Q", bytes(host.read(offset, words * 8)))
    if _SWAP:
        table.byteswap()
    return table


def pack_table(table: array[int]) -> bytes:
    """The words as they lie in the image."""
    words = table[:]
    if _SWAP:
        words.byteswap()
    return words.tobytes()


class Tables:
    """The active L1 table, and a cache of the L2 tables that it names.

    Loading and storing belong under the image's lock; looking at what is in memory does not.
    """

    def __init__(self, host: Host, header: Header, cache_bytes: int) -> None:
        self._host = host
        self.bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.l2_entries = header.l2_entries
        self.extended = header.extended_l2
        self.subcluster_size = (
            header.cluster_size // layout.SUBCLUSTERS if self.extended else header.cluster_size
        )
        """The unit of mapping, in bytes."""
        self._external = header.has_data_file
        self.l1_offset = header.l1_table_offset
        self.l1 = load_table(host, header.l1_table_offset, header.l1_size)
        self._cache: OrderedDict[int, array[int]] = OrderedDict()
        self._most = max(2, cache_bytes // header.cluster_size)
        self._lent: dict[int, Claims] = {}
        """By L1 entry: L2 tables in which the data path makes entries."""

    # -- tables -------------------------------------------------------------------------------

    def l2_offset(self, index: int) -> int:
        """Where the L2 table of an L1 entry lies; 0: nowhere."""
        if index >= len(self.l1):
            return 0
        offset = self.l1[index] & OFFSET_MASK
        if offset % self.cluster_size:
            raise CorruptImage(f"L1 entry {index}: an L2 table can't be at {offset:#x}")
        return offset

    def cached(self, index: int) -> array[int] | None:
        """The L2 table of an L1 entry if it is in memory.  Never waits."""
        return self._cache.get(self.l2_offset(index))

    def l2(self, index: int) -> array[int] | None:
        """The L2 table of an L1 entry; None: there is none.  Nobody else changes it (any more)."""
        self.take_back(index)
        return self.look(index)

    def look(self, index: int) -> array[int] | None:
        """As `l2`, but the data path may be making entries there."""
        offset = self.l2_offset(index)
        if not offset:
            return None
        table = self._cache.get(offset)
        if table is None:
            table = load_table(self._host, offset, self.cluster_size // 8)
            self.keep(offset, table)
        else:
            self._cache.move_to_end(offset)
        return table

    def keep(self, offset: int, table: array[int]) -> None:
        """Put a table into the cache, and drop the one that was used longest ago."""
        self._cache[offset] = table
        while len(self._cache) > self._most:
            oldest = next(iter(self._cache))
            for index in [index for index in self._lent if self.l2_offset(index) == oldest]:
                self.take_back(index)
            del self._cache[oldest]

    def forget_cached(self) -> None:
        """Tables were changed behind the cache's back."""
        self.take_all_back()
        self._cache.clear()

    def lend(self, index: int, claims: Claims) -> None:
        """Let the data path make entries in an L2 table, until somebody asks for that by `l2`."""
        table = self.l2(index)
        assert table is not None, "there is no table to lend"
        claims.lend((index * self.l2_entries) << self.bits, table, self.l2_offset(index))
        self._lent[index] = claims

    def take_back(self, index: int) -> None:
        """The end of what `lend` began, if it did."""
        claims = self._lent.pop(index, None)
        if claims is not None:
            claims.take_back((index * self.l2_entries) << self.bits)

    @contextmanager
    def alone(self, index: int) -> Iterator[None]:
        """Nobody else changes an L2 table inside; who was lent it gets it again."""
        claims = self._lent.get(index)
        self.take_back(index)
        yield
        if claims is not None and self.cached(index) is not None:
            self.lend(index, claims)

    def take_all_back(self) -> None:
        """`take_back` for all tables."""
        for index in tuple(self._lent):
            self.take_back(index)

    def change(self, index: int, words: Mapping[int, int]) -> None:
        """Write the sectors of an L2 table with these words changed, and keep it so.

        If the host refuses, the table in memory becomes what the host has.
        """
        offset, old = self.l2_offset(index), self.l2(index)
        assert old is not None, "there is no table to change"
        # Who looks without the lock sees a word before or after; two words belong together.
        table = array("Q", old) if self.extended else old
        try:
            for start, stop, changed in _sectors(words):
                part = old[start:stop]
                for word in changed:
                    part[word - start] = words[word]
                self._host.write(offset + start * 8, pack_table(part))
        except DriverError:
            self._cache.pop(offset, None)
            raise
        for word, value in words.items():
            table[word] = value
        self.keep(offset, table)

    def set_l1(self, index: int, entry: int) -> None:
        """Write and change one L1 entry."""
        self.take_back(index)
        self._host.write(self.l1_offset + index * 8, entry.to_bytes(8, "big"))
        self.l1[index] = entry

    def copy_l1(self, offset: int) -> None:
        """Write the L1 table elsewhere; see `move_l1`."""
        self._host.write(offset, pack_table(self.l1))

    def move_l1(self, offset: int, entries: int) -> None:
        """The header says that the table lies elsewhere, with so many entries: so it is."""
        self.l1.extend([0] * (entries - len(self.l1)))
        self.l1_offset = offset

    # -- entries ------------------------------------------------------------------------------

    def pieces(self, offset: int, length: int, *, wait: bool = True) -> Iterator[Piece]:
        """What lies in a range of the disk, neighbours that continue each other as one.

        `wait` False: only as far as the tables are in memory.  Raises `CorruptImage`.
        """
        last: Piece | None = None
        for piece in self._small_pieces(offset, length, wait=wait):
            if last is not None and _continues(last, piece):
                last = Piece(
                    last.kind, last.offset, last.length + piece.length, last.host, last.writable
                )
            else:
                if last is not None:
                    yield last
                last = piece
        if last is not None:
            yield last

    def _small_pieces(self, offset: int, length: int, *, wait: bool) -> Iterator[Piece]:
        end = offset + length
        per_table = self.l2_entries << self.bits
        while offset < end:
            index = offset // per_table
            stop = min(end, (index + 1) * per_table)
            table = self.look(index) if wait else self.cached(index)
            if table is None:
                if not wait and self.l2_offset(index):
                    return
                yield Piece(Kind.UNALLOCATED, offset, stop - offset)
            else:
                shared = not self.l1[index] & COPIED
                find = self._extended_pieces if self.extended else self._plain_pieces
                yield from find(table, offset, stop, shared)
            offset = stop

    def _plain_pieces(
        self, table: array[int], offset: int, stop: int, shared: bool
    ) -> Iterator[Piece]:
        bits = self.bits
        within = self.cluster_size - 1
        while offset < stop:
            place = (offset >> bits) % self.l2_entries
            end = min(stop, (offset | within) + 1)
            entry = table[place]
            if entry & COMPRESSED:
                yield Piece(Kind.COMPRESSED, offset, end - offset, entry)
            elif entry & ZERO:
                yield Piece(Kind.ZERO, offset, end - offset)
            elif self.has_host(entry):
                host = self.host_offset(entry)
                yield Piece(
                    Kind.NORMAL,
                    offset,
                    end - offset,
                    host + (offset & within),
                    bool(entry & COPIED) and not shared,
                )
            else:
                yield Piece(Kind.UNALLOCATED, offset, end - offset)
            offset = end

    def _extended_pieces(
        self, table: array[int], offset: int, stop: int, shared: bool
    ) -> Iterator[Piece]:
        within = self.cluster_size - 1
        unit = self.subcluster_size
        while offset < stop:
            place = (offset >> self.bits) % self.l2_entries
            end = min(stop, (offset | within) + 1)
            entry, bitmap = table[2 * place], table[2 * place + 1]
            if entry & COMPRESSED:
                yield Piece(Kind.COMPRESSED, offset, end - offset, entry)
                offset = end
                continue
            self.check_bitmap(entry, bitmap)
            host = self.host_offset(entry) if self.has_host(entry) else 0
            writable = bool(entry & COPIED) and not shared
            while offset < end:
                number = (offset & within) // unit
                limit = min(end, offset - offset % unit + unit)
                if bitmap >> 32 + number & 1:
                    yield Piece(Kind.ZERO, offset, limit - offset)
                elif bitmap >> number & 1:
                    at = host + (offset & within)
                    yield Piece(Kind.NORMAL, offset, limit - offset, at, writable)
                else:
                    yield Piece(Kind.UNALLOCATED, offset, limit - offset)
                offset = limit

    def has_host(self, entry: int) -> bool:
        """Whether an L2 entry, which is not compressed, names a host cluster."""
        # In an external data file, offset 0 is as good as any other.
        return bool(entry & OFFSET_MASK) or (self._external and bool(entry & COPIED))

    def host_offset(self, entry: int) -> int:
        """Of the host cluster that an L2 entry names."""
        offset = entry & OFFSET_MASK
        if offset % self.cluster_size:
            raise CorruptImage(f"an L2 entry names a cluster at {offset:#x}, inside another")
        return offset

    def check_bitmap(self, entry: int, bitmap: int) -> None:
        """Raise `CorruptImage` for a subcluster bitmap that contradicts itself or its entry."""
        allocated = bitmap & ALL_ALLOCATED
        if allocated & bitmap >> 32:
            raise CorruptImage(f"subclusters are both allocated and zero ({bitmap:#x})")
        if allocated and not self.has_host(entry):
            raise CorruptImage(f"subclusters are allocated nowhere ({bitmap:#x})")


def _continues(last: Piece, piece: Piece) -> bool:
    if last.kind is not piece.kind or last.writable is not piece.writable:
        return False
    if piece.kind is Kind.NORMAL:
        return last.host + last.length == piece.host
    # A compressed cluster is read as a whole: its pieces are never joined with others'.
    return piece.kind is not Kind.COMPRESSED


def _sectors(words: Iterable[int]) -> Iterator[tuple[int, int, list[int]]]:
    """The words, in order, by runs of whole sectors: first word, the one behind, which of them."""
    found: list[int] = []
    for word in sorted(words):
        if found and word // SECTOR_WORDS > found[-1] // SECTOR_WORDS + 1:
            yield (*_whole(found), found)
            found = []
        found.append(word)
    if found:
        yield (*_whole(found), found)


def _whole(words: Sequence[int]) -> tuple[int, int]:
    return words[0] - words[0] % SECTOR_WORDS, words[-1] - words[-1] % SECTOR_WORDS + SECTOR_WORDS
