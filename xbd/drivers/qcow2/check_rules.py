"""What L1 and L2 entries may say, and what becomes of those that say something else.

Source: QEMU's docs/interop/qcow2.rst, "Cluster mapping" and "Extended L2 Entries".

An entry that names no cluster of the file has lost its data: it is made to read as zeroes, or in
version 2, which has no such thing, to be unallocated.
"""

from __future__ import annotations

from array import array
from typing import Final

import attrs

from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.layout import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
)
from xbd.drivers.qcow2.references import zeroed

MOST_MESSAGES: Final = 2000

# What can't be in a cluster, because something else is.
NO_TABLE: Final = 1
"""An L2 table, or a snapshot's L1 table."""
NO_DATA: Final = 2


@attrs.define
class Findings:
    """What is wrong, counted as qemu-img does."""

    corruptions: int = 0
    leaks: int = 0
    errors: int = 0
    messages: list[str] = attrs.field(factory=list)
    unsaid: int = 0
    """Messages that were too many."""

    def corrupt(self, message: str, times: int = 1) -> None:
        self.corruptions += times
        self._say(message)

    def leak(self, message: str) -> None:
        self.leaks += 1
        self._say(message)

    def error(self, message: str) -> None:
        self.errors += 1
        self._say(message)

    def _say(self, message: str) -> None:
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(message)
        else:
            self.unsaid += 1


class Rules:
    """Of one image."""

    def __init__(self, header: Header, file_size: int) -> None:
        self._bits = header.cluster_bits
        # Asking the header for each entry would take more time than all the rest.
        self.extended = header.extended_l2
        self.external = header.has_data_file
        self._lost_entry = ZERO if header.version >= 3 and not header.extended_l2 else 0
        self._clusters = -(-file_size // header.cluster_size)
        self._file_size = file_size
        self._within = header.cluster_size - 1
        self.marks: memoryview[int] | None = None
        """A byte for every cluster: `NO_TABLE`, `NO_DATA`."""
        self.odd: Final = COMPRESSED | L2_RESERVED | self._within & OFFSET_MASK
        """Bits that no entry of an ordinary cluster has."""

    def mark(self, offset: int, length: int, marks: int) -> None:
        """Say of a range of bytes what can't be there."""
        if self.marks is None:
            self.marks = zeroed(self._clusters, "B")
        for cluster in range(*self._clusters_of(offset, length)):
            self.marks[cluster] |= marks

    def may_have(self, offset: int, length: int, mark: int) -> bool:
        """Whether nothing in a range of bytes has this mark."""
        if self.marks is None:
            return True
        start, stop = self._clusters_of(offset, length)
        return not any(found & mark for found in self.marks[start:stop])

    def _clusters_of(self, offset: int, length: int) -> tuple[int, int]:
        end = (offset + length + self._within) >> self._bits
        return offset >> self._bits, min(end, self._clusters)

    # -- L1 -----------------------------------------------------------------------------------

    def l1_fault(self, entry: int) -> str | None:
        """Why a used L1 entry names no L2 table, if it does not."""
        offset = entry & OFFSET_MASK
        if not offset:
            return "names no L2 table and is not empty"
        if offset & self._within:
            return f"names an L2 table at {offset:#x}, inside a cluster"
        if offset >> self._bits >= self._clusters:
            return f"names an L2 table at {offset:#x}, behind the file's end"
        if not self.may_have(offset, 1, NO_TABLE):
            return f"names an L2 table at {offset:#x}, where other metadata are"
        return None

    def mended_l1(self, entry: int) -> int:
        if not entry or self.l1_fault(entry):
            return 0
        return entry & ~L1_RESERVED

    # -- L2 -----------------------------------------------------------------------------------

    def has_host(self, entry: int) -> bool:
        """Whether an entry that is not compressed names a host cluster."""
        if entry & OFFSET_MASK:
            return True
        # In an external data file, the first cluster is as good as any other.
        zero = entry & ZERO and not self.extended
        return self.external and bool(entry & COPIED) and not zero

    def is_usual(self, entry: int) -> bool:
        """Whether an entry names a cluster of the file that may hold data, and has no odd bits."""
        cluster = (entry & OFFSET_MASK) >> self._bits
        if entry & self.odd or cluster >= self._clusters:
            return False
        return self.marks is None or not self.marks[cluster] & NO_DATA

    def names_cluster(self, entry: int) -> bool:
        """Whether the host cluster that an entry names is one of the file, for data."""
        offset = entry & OFFSET_MASK
        if offset & self._within or offset >> self._bits >= self._clusters:
            return False
        return self.may_have(offset, 1, NO_DATA)

    def compressed_extent(self, entry: int) -> tuple[int, int] | None:
        """Where a compressed cluster's bytes lie; None: not in the file, or where no data are."""
        offset, length = layout.compressed_extent(entry & ~COPIED, self._bits)
        if offset + length - self._file_size > self._within:
            return None
        return (offset, length) if self.may_have(offset, length, NO_DATA) else None

    def is_l2_table(self, table: array[int], guest: int | None) -> bool:
        """Whether all entries of a table could be what they are, but for COPIED flags."""
        step = 2 if self.extended else 1
        for place in range(0, len(table), step):
            entry, bitmap = table[place], table[place + 1] if self.extended else 0
            at = None if guest is None else guest + (place // step << self._bits)
            if self.mended_l2(entry, bitmap, at) != (entry, bitmap):
                return False
        return True

    def mended_l2(self, entry: int, bitmap: int, at: int | None) -> tuple[int, int]:
        """What an L2 entry should be, but for its COPIED flag.

        `bitmap` is 0 if it has none; `at` is the cluster's offset on the disk, None if it is on
        no disk or at more than one place.
        """
        if entry & COMPRESSED:
            if self.external or self.compressed_extent(entry) is None:
                return self._lost(bitmap=ALL_ZERO)
            return entry & ~COPIED, 0
        entry &= ~L2_RESERVED
        if not self.has_host(entry):
            # Nothing is allocated where there is no cluster.
            return entry, (bitmap | (bitmap & ALL_ALLOCATED) << 32) & ALL_ZERO
        if self.external:
            offset = entry & OFFSET_MASK
            if at is None:
                if offset & self._within:
                    return self._lost(bitmap=bitmap)
            elif offset != at:
                if entry & ZERO and not self.extended:
                    return ZERO, 0
                entry = entry & ~OFFSET_MASK | at & OFFSET_MASK
        elif not self.names_cluster(entry):
            return self._lost(bitmap=bitmap)
        # Of a subcluster that is both, the data are kept.
        return entry, bitmap & ~((bitmap & ALL_ALLOCATED) << 32)

    def _lost(self, bitmap: int) -> tuple[int, int]:
        if self.extended:
            return 0, (bitmap | (bitmap & ALL_ALLOCATED) << 32) & ALL_ZERO
        return self._lost_entry, 0
