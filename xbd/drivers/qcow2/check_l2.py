"""Counting what L2 tables name.

Source: QEMU's docs/interop/qcow2.rst, "Cluster mapping" and "Extended L2 Entries".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.check_rules import NO_DATA, Findings, Rules
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.layout import ALL_ALLOCATED, COMPRESSED, L2_RESERVED, OFFSET_MASK, ZERO
from xbd.drivers.qcow2.references import References


def pairs(table: array[int], header: Header) -> Iterable[tuple[int, int]]:
    """The entries of an L2 table, each with its subcluster bitmap, or 0 where there are none."""
    if header.extended_l2:
        return zip(table[::2], table[1::2], strict=True)
    return ((entry, 0) for entry in table)


class L2Counter:
    """Looks at tables one after the other.

    `mend`: entries count as `Rules` would mend them; otherwise as they are, like qemu-img's.
    """

    def __init__(
        self,
        header: Header,
        references: References,
        rules: Rules,
        found: Findings,
        *,
        mend: bool,
    ) -> None:
        self._header = header
        self._references = references
        self._rules = rules
        self._found = found
        self._mend = mend
        self._within = header.cluster_size - 1
        self._plain = not (rules.extended or rules.external)
        self.allocated = self.compressed = self.fragmented = 0
        """Clusters of the disk."""

    def count(self, table: array[int], times: int, guest: int | None) -> None:
        """Take in a table which so many L1 entries name, one of them for the disk's offset
        `guest`."""
        if self._plain:
            self._count_plain(table, times)
        else:
            self._count_any(table, times, guest)

    def _count_plain(self, table: array[int], times: int) -> None:
        """The usual case, made for speed."""
        references, bits = self._references, self._references.bits
        counts, clusters, largest = references.counts, references.clusters, references.largest
        cluster_size = self._header.cluster_size
        odd, marks = self._rules.odd, self._rules.marks
        allocated = fragmented = expected = 0
        for entry in table:
            if not entry:
                continue
            offset = entry & OFFSET_MASK
            cluster = offset >> bits
            if entry & odd or cluster >= clusters or (marks and marks[cluster] & NO_DATA):
                mended = self._rules.mended_l2(entry, 0, None)[0] if self._mend else entry
                if self._count_odd(mended, 0, times) and not entry & COMPRESSED:
                    allocated += 1
                    fragmented += bool(expected) and offset != expected
                    expected = offset + cluster_size
            elif cluster:
                allocated += 1
                if offset != expected and expected:
                    fragmented += 1
                expected = offset + cluster_size
                count = counts[cluster] + times
                if count > largest:
                    references.add_cluster(cluster, times)
                else:
                    counts[cluster] = count
        self.allocated += allocated
        self.fragmented += fragmented

    def _count_any(self, table: array[int], times: int, guest: int | None) -> None:
        """Extended entries, an external data file, or entries to be mended."""
        bits, expected = self._header.cluster_bits, 0
        for index, (word, subclusters) in enumerate(pairs(table, self._header)):
            entry, bitmap = word, subclusters
            if not entry and not bitmap:
                continue
            at = None if guest is None else guest + (index << bits)
            if self._mend:
                entry, bitmap = self._rules.mended_l2(entry, bitmap, at)
            if self._count_odd(entry, bitmap, times, at) and not entry & COMPRESSED:
                offset = entry & OFFSET_MASK
                self.allocated += 1
                self.fragmented += bool(expected) and offset != expected
                expected = offset + self._header.cluster_size

    def _count_odd(self, entry: int, bitmap: int, times: int, at: int | None = None) -> bool:
        """Look closely at an entry; returns whether something is allocated."""
        found = self._found
        if entry & COMPRESSED:
            return self._count_compressed(entry, bitmap, times)
        told = f"L2 entry {entry:#x}"
        if entry & L2_RESERVED:
            found.corrupt(f"{told} has reserved bits set", times)
        if not self._rules.has_host(entry):
            if bitmap & ALL_ALLOCATED:
                found.corrupt(f"{told}: subclusters are allocated nowhere ({bitmap:#x})", times)
            return False
        if bitmap & bitmap >> 32 & ALL_ALLOCATED:
            found.corrupt(f"{told}: subclusters are both allocated and zero ({bitmap:#x})", times)
        offset = entry & OFFSET_MASK
        if offset & self._within:
            found.corrupt(f"{told} names a cluster inside another", times)
        if self._rules.external:
            if at is not None and offset != at and not entry & ZERO:
                found.corrupt(f"{told} names another cluster of the data file than its own", times)
        else:
            self._add(offset, self._within + 1, told, times)
        return True

    def _add(self, offset: int, length: int, told: str, times: int) -> None:
        if not self._references.add(offset, length, times):
            self._found.corrupt(f"{told} reaches beyond the file's end", times)

    def _count_compressed(self, entry: int, bitmap: int, times: int) -> bool:
        found = self._found
        told = f"L2 entry {entry:#x} of a compressed cluster"
        if entry & layout.COPIED:
            found.corrupt(f"{told} has the COPIED flag", times)
        if self._rules.external:
            found.corrupt(f"{told} with an external data file", times)
            return False
        if bitmap:
            found.corrupt(f"{told} has a subcluster bitmap ({bitmap:#x})", times)
            return False
        extent = layout.compressed_extent(entry & ~layout.COPIED, self._header.cluster_bits)
        self._add(*extent, told, times)
        self.allocated += 1
        self.compressed += 1
        self.fragmented += 1
        return True
