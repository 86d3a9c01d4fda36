"""Following everything that an image's metadata name, once, and counting it.

Source: QEMU's docs/interop/qcow2.rst.  What counts as one corruption is qemu-img's custom.

Time is bounded by the file's size: an L2 table is read once, however many L1 entries name it, and
L1 tables and bitmaps' tables that together need more room than the file has are not followed.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Final

import attrs

from xbd.core.driver import DriverError, Progress
from xbd.drivers.qcow2 import bitmaps
from xbd.drivers.qcow2.check_l2 import L2Counter
from xbd.drivers.qcow2.check_rules import NO_DATA, NO_TABLE, Findings, Rules
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import L1_RESERVED, OFFSET_MASK
from xbd.drivers.qcow2.metadata import MOST_SNAPSHOT_L1_BYTES, encryption_header
from xbd.drivers.qcow2.references import References, zeroed
from xbd.drivers.qcow2.snapshot_table import (
    LEAST_EXTRA_BYTES,
    Snapshot,
    l1_problem,
    read_snapshots,
)
from xbd.drivers.qcow2.sparse import used_entries
from xbd.drivers.qcow2.tables import load_table

_MOST_TIMES: Final = (1 << 32) - 1


@attrs.frozen
class Rulings:
    """Who is right where two things are said to lie in one cluster."""

    marks: tuple[tuple[int, int, int], ...] = ()
    """Offset and length of a range in bytes, and what is not there."""
    no_bitmaps: bool = False


class Walk:
    """One walk over an image.  After `run`, `references` has all but the refcount structures.

    `mend`: entries count as `Rules` would mend them; otherwise as they are, like qemu-img's.
    """

    def __init__(
        self, host: Host, header: Header, *, mend: bool, rulings: Rulings | None = None
    ) -> None:
        self._host = host
        self._header = header
        self._mend = mend
        size = host.size()
        self.references = References(header, size)
        self.found = Findings()
        encryption = encryption_header(header)
        self._parts = [(0, header.cluster_size), *([encryption] if encryption else [])]
        self.rules = Rules(header, size)
        self._rulings = Rulings() if rulings is None else rulings
        for offset, length, marks in self._rulings.marks:
            self.rules.mark(offset, length, marks)
        self.snapshots: list[Snapshot] = []
        """Those whose L1 tables can be followed."""
        self.snapshots_changed = False
        """The table must be written anew, with what is in `snapshots`."""
        self.snapshot_table_bytes = 0
        self.bitmaps_broken = False
        self.lost = False
        """What the header names is not in the file: nobody knows what it named."""
        self.l1: array[int] = array("Q")
        """The active one, as it is in the file."""
        self.tables: array[int] = array("Q")
        """Host clusters that are L2 tables; those that the active L1 table names come first."""
        self.active_tables = 0
        self.active_indices: array[int] = array("Q")
        """The first place in the active L1 table that names each of the active ones."""
        self._times = zeroed(self.references.clusters, "I")
        """How often an L2 table is named."""
        self.active = L2Counter(header, self.references, self.rules, self.found, mend=mend)
        self._inactive = L2Counter(header, self.references, self.rules, self.found, mend=mend)

    def run(self, progress: Progress) -> None:
        """`progress` counts L2 tables."""
        self._walk_snapshot_table()
        self._walk_l1_tables()
        for offset, length in self._parts:
            self._count(offset, length, "the header", vital=True)
        self._walk_bitmaps()
        for number, cluster in enumerate(self.tables):
            progress(number, len(self.tables))
            self._walk_l2(number, cluster)
        if self.references.overflows:
            self.found.corrupt(
                f"clusters are used more often than refcounts of {self._header.refcount_bits} "
                "bits can say",
                self.references.overflows,
            )

    def _count(
        self, offset: int, length: int, what: str, times: int = 1, *, vital: bool = False
    ) -> None:
        if not self.references.add(offset, length, times):
            self.lost |= vital
            self.found.corrupt(
                f"{what}: {length} bytes at {offset:#x} reach beyond the file's end", times
            )

    # -- snapshots ----------------------------------------------------------------------------

    def _walk_snapshot_table(self) -> None:
        header, found = self._header, self.found
        table = read_snapshots(self._host, header)
        self.snapshot_table_bytes = table.length
        for number in table.excess:
            found.corrupt(f"snapshot {number} has too much extra data")
        if table.lost:
            found.corrupt(f"the snapshot table is too large: {table.lost} snapshots are lost")
        self.snapshots_changed = bool(table.excess or table.lost)
        if table.snapshots and header.has_data_file:
            found.corrupt("an image with an external data file can't have snapshots")
        for number, snapshot in enumerate(table.snapshots):
            if header.version >= 3 and len(snapshot.extra_data) < LEAST_EXTRA_BYTES:
                found.corrupt(f"snapshot {number} does not say how large the disk was")
                self.snapshots_changed = True
            problem = l1_problem(snapshot, header)
            if problem:
                found.corrupt(f"snapshot {number}: {problem}")
                self.snapshots_changed = True
            elif self._mend and not snapshot.l1_table_offset:
                # Nothing was ever here: the number of snapshots is wrong.
                self.snapshots_changed = True
            else:
                self.snapshots.append(snapshot)
        if not self._mend:
            self._count(header.snapshots_offset, table.length, "the snapshot table")

    def _choose_snapshots(self) -> None:
        """To be mended, give up those whose L1 table lies where something of the disk is."""
        kept = [snapshot for snapshot in self.snapshots if self._has_l1_table(snapshot)]
        self.snapshots_changed |= len(kept) < len(self.snapshots)
        self.snapshots = kept
        for snapshot in kept:
            self.rules.mark(snapshot.l1_table_offset, snapshot.l1_size * 8, NO_TABLE)
        table = self._header.snapshots_offset, self.snapshot_table_bytes
        if not (self.snapshots_changed or self.references.add(*table)):
            self.snapshots_changed = True

    def _mark_header_parts(self) -> None:
        header = self._header
        for offset, length in (*self._parts, (header.l1_table_offset, header.l1_size * 8)):
            self.rules.mark(offset, length, NO_TABLE | NO_DATA)
        if not self.snapshots_changed:
            table = header.snapshots_offset, self.snapshot_table_bytes
            self.rules.mark(*table, NO_TABLE | NO_DATA)

    def _has_l1_table(self, snapshot: Snapshot) -> bool:
        offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
        if not self.references.fits(offset, max(1, length)):
            return False
        return self.rules.may_have(offset, length, NO_TABLE) and not self._is_l2_table(
            offset, length
        )

    def _is_l2_table(self, offset: int, length: int) -> bool:
        bits = self._header.cluster_bits
        end = min(-(-(offset + length) >> bits), self.references.clusters)
        return any(self._times[offset >> bits : end])

    # -- L1 -----------------------------------------------------------------------------------

    def _walk_l1_tables(self) -> None:
        header = self._header
        self._count(header.l1_table_offset, header.l1_size * 8, "the L1 table", vital=True)
        self.l1 = load_table(self._host, header.l1_table_offset, header.l1_size)
        if self._mend:
            self._mark_header_parts()
        self._walk_l1(self.l1, "L1", 1)
        self.active_tables = len(self.tables)
        places = {(snapshot.l1_table_offset, snapshot.l1_size) for snapshot in self.snapshots}
        total = sum(entries * 8 for _, entries in places)
        if total > min(self.references.file_size, MOST_SNAPSHOT_L1_BYTES):
            self.found.error("the snapshots' L1 tables are too large together to be followed")
            return
        if self._mend:
            self._choose_snapshots()
        times = Counter((s.l1_table_offset, s.l1_size) for s in self.snapshots)
        for (offset, entries), count in times.items():
            self._count(offset, entries * 8, "a snapshot's L1 table", count)
            self._walk_l1(load_table(self._host, offset, entries), "a snapshot's L1", count)

    def _walk_l1(self, table: array[int], what: str, times: int) -> None:
        references = self.references
        active = table is self.l1
        cluster_size = self._header.cluster_size
        for index, entry in used_entries(table):
            if entry & L1_RESERVED:
                self.found.corrupt(
                    f"{what} entry {index} has reserved bits set ({entry:#x})", times
                )
            fault = self.rules.l1_fault(entry)
            if fault:
                self.found.corrupt(f"{what} entry {index} {fault}", times)
                if not self._mend and (entry & OFFSET_MASK) % cluster_size:
                    references.add(entry & OFFSET_MASK, cluster_size, times)
                continue
            cluster = (entry & OFFSET_MASK) >> references.bits
            references.add_cluster(cluster, times)
            if not self._times[cluster]:
                self.tables.append(cluster)
                if active:
                    self.active_indices.append(index)
            self._times[cluster] = min(self._times[cluster] + times, _MOST_TIMES)

    # -- what the header names besides --------------------------------------------------------

    def _walk_bitmaps(self) -> None:
        try:
            for offset, length in self._bitmap_ranges():
                if not self.references.fits(offset, length):
                    raise CorruptImage(f"{offset:#x} is behind the file's end")
                if self._mend and self._is_l2_table(offset, length):
                    raise CorruptImage(f"at {offset:#x} is an L2 table")
            if self._rulings.no_bitmaps:
                raise CorruptImage("they lie where other things are")
        except CorruptImage as error:
            self.found.corrupt(f"the bitmaps can't be used: {error}")
            self.bitmaps_broken = True
            return
        for offset, length in self._bitmap_ranges():
            self.references.add(offset, length)

    def _bitmap_ranges(self) -> Iterator[tuple[int, int]]:
        directory = bitmaps.directory_of(self._header)
        if directory is None:
            return
        yield directory.offset, directory.size
        room = self.references.file_size
        for bitmap in bitmaps.load_bitmaps(self._host, self._header):
            length = bitmap.table_size * 8
            room -= length
            if room < 0:
                raise CorruptImage("their tables are too large together to be followed")
            yield bitmap.table_offset, length
            for offset in bitmaps.bitmap_data(self._host, self._header, bitmap):
                yield offset, self._header.cluster_size

    # -- who is right -------------------------------------------------------------------------

    def judge(self) -> Rulings:
        """Before a second walk, look at tables that share a cluster with something else.

        What could not be a table is taken for data that a wrong entry names as a table; otherwise
        the entry that names it as data is wrong.
        """
        marks: list[tuple[int, int, int]] = []
        cluster_size = self._header.cluster_size
        for number, cluster in enumerate(self.tables):
            if self.references.counts[cluster] > self._times[cluster]:
                offset = cluster * cluster_size
                words = load_table(self._host, offset, cluster_size // 8)
                good = self.rules.is_l2_table(words, self.guest_offset(number))
                marks.append((offset, cluster_size, NO_DATA if good else NO_TABLE))
        for snapshot in self._sharing_snapshots():
            words = load_table(self._host, snapshot.l1_table_offset, snapshot.l1_size)
            good = all(self.rules.mended_l1(entry) == entry for entry in words)
            length = snapshot.l1_size * 8
            marks.append((snapshot.l1_table_offset, length, NO_DATA if good else NO_TABLE))
        no_bitmaps = not self.bitmaps_broken and any(
            any(count > 1 for count in self.references.counts[slice(*self._clusters(*place))])
            for place in self._bitmap_ranges()
        )
        return Rulings(tuple(marks), no_bitmaps)

    def _sharing_snapshots(self) -> Iterator[Snapshot]:
        """Those in whose L1 table something else lies."""
        places = {(s.l1_table_offset, s.l1_size): s for s in self.snapshots}
        times = Counter((s.l1_table_offset, s.l1_size) for s in self.snapshots)
        for (offset, entries), snapshot in places.items():
            clusters = slice(*self._clusters(offset, entries * 8))
            if any(count > times[offset, entries] for count in self.references.counts[clusters]):
                yield snapshot

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        bits = self._header.cluster_bits
        return offset >> bits, -(-(offset + length) >> bits)

    # -- L2 -----------------------------------------------------------------------------------

    def guest_offset(self, number: int) -> int | None:
        """Of the disk's part that an L2 table stands for; None: it is none, or more than one."""
        if number >= self.active_tables or self._times[self.tables[number]] > 1:
            return None
        return self.active_indices[number] * self._header.l1_coverage

    def _walk_l2(self, number: int, cluster: int) -> None:
        header = self._header
        try:
            words = load_table(self._host, cluster << header.cluster_bits, header.cluster_size // 8)
        except DriverError as error:
            self.found.error(f"an L2 table can't be read: {error}")
            return
        counter = self.active if number < self.active_tables else self._inactive
        counter.count(words, self._times[cluster], self.guest_offset(number))
