"""The refcounts in an image, beside those that a walk over its metadata counted.

Source: QEMU's docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from array import array
from typing import Final

from xbd.drivers.qcow2.check_rules import Findings
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import REFCOUNT_TABLE_RESERVED
from xbd.drivers.qcow2.refcount_block import RefcountBlock
from xbd.drivers.qcow2.references import References
from xbd.drivers.qcow2.tables import load_table

NOWHERE: Final = -1
"""Where a refcount block lies whose place in the table says nothing usable."""


class Refcounts:
    """The refcount table, and what its blocks say."""

    def __init__(self, host: Host, header: Header, references: References, found: Findings) -> None:
        self._host = host
        self._header = header
        self._references = references
        self._found = found
        self.entries = header.refcount_block_entries
        self.sound = True
        """Every count that is needed has its place, which nothing else uses."""
        self.blocks: array[int] = array("q")
        """Their offsets; 0: there is none."""
        self.differing: list[int] = []
        """Blocks with wrong counts."""
        self.end = 0
        """Behind the last cluster that is used, or is said to be."""
        self._ones: dict[int, bytes | None] = {}
        """Of the blocks with wrong counts, which of them are 1; None: it is not known."""
        self._beyond: tuple[int, RefcountBlock] | None = None

    def count(self) -> None:
        """Count the table and the blocks themselves: after everything else."""
        header, references = self._header, self._references
        offset = header.refcount_table_offset
        length = header.refcount_table_clusters * header.cluster_size
        if not references.add(offset, length):
            self._unsound("the refcount table reaches beyond the file's end")
            return
        for index, entry in enumerate(load_table(self._host, offset, length // 8)):
            self.blocks.append(self._count_block(index, entry))
        first = offset >> header.cluster_bits
        for cluster in range(first, first + header.refcount_table_clusters):
            # Nothing is wrong with its count then, but it can't be written to.
            self.sound &= references.counts[cluster] == 1

    def _count_block(self, index: int, entry: int) -> int:
        """Where a block can be read."""
        header, references = self._header, self._references
        offset = entry & ~REFCOUNT_TABLE_RESERVED
        cluster = offset >> header.cluster_bits
        place = NOWHERE
        if offset % header.cluster_size:
            problem = f"names a block at {offset:#x}, inside a cluster"
        elif cluster >= references.clusters:
            problem = f"names a block at {offset:#x}, behind the file's end"
            place = 0  # where everything is zero
        elif entry != offset:
            problem = f"has reserved bits set ({entry:#x})"
            place = offset
        elif not entry:
            return 0
        else:
            references.add_cluster(cluster)
            if references.counts[cluster] == 1:
                return offset
            problem = f"names a block at {offset:#x}, where something else is"
            place = offset
        self._unsound(f"refcount table entry {index} {problem}")
        return place

    def _unsound(self, message: str) -> None:
        self._found.corrupt(message)
        self.sound = False

    def load(self, index: int) -> RefcountBlock:
        """One that has a place."""
        data = self._host.read(self.blocks[index], self._header.cluster_size)
        return RefcountBlock(data, self._header.refcount_order)

    def compare(self) -> None:
        """Tell of every count that is wrong: too low is a corruption, too high a leak."""
        references, entries = self._references, self.entries
        for index in range(-(-references.end // entries)):
            first = index * entries
            size = min(entries, references.end - first)
            ours = references.refcounts(first, size)
            place = self.blocks[index] if index < len(self.blocks) else 0
            if place == NOWHERE:
                self._ones[index] = None
                self._note_end(first, ours)
                continue
            theirs = (
                self.load(index).counts[:size]
                if place
                else array(ours.typecode, bytes(size * ours.itemsize))
            )
            self._note_end(first, ours)
            if theirs.tobytes() == ours.tobytes():
                continue
            if not place:
                self.sound = False
            self.differing.append(index)
            self._note_end(first, theirs)
            self._ones[index] = bytes(count == 1 for count in theirs)
            self._tell(first, theirs, ours)

    def _tell(self, first: int, theirs: array[int], ours: array[int]) -> None:
        for place, (said, counted) in enumerate(zip(theirs, ours, strict=True)):
            if said != counted:
                message = f"cluster {first + place} has refcount {said} and is used {counted} times"
                (self._found.corrupt if said < counted else self._found.leak)(message)

    def _note_end(self, first: int, counts: array[int]) -> None:
        used = len(counts.tobytes().rstrip(b"\0"))
        if used:
            self.end = max(self.end, first + -(-used // counts.itemsize))

    def is_one(self, cluster: int) -> bool | None:
        """Whether the image says that a cluster is used once; None: it does not say.  After
        `compare`."""
        index, place = divmod(cluster, self.entries)
        if cluster >= self._references.end:
            return self._is_one_beyond(index, place)
        if index not in self._ones:
            return self._references.counts[cluster] == 1
        ones = self._ones[index]
        return None if ones is None else bool(ones[place])

    def _is_one_beyond(self, index: int, place: int) -> bool | None:
        """Of a cluster behind the file's end."""
        if index >= len(self.blocks) or not self.blocks[index]:
            return False
        if self.blocks[index] == NOWHERE:
            return None
        if self._beyond is None or self._beyond[0] != index:
            self._beyond = index, self.load(index)
        return self._beyond[1].counts[place] == 1

    @property
    def all_right(self) -> bool:
        """Whether every count is the one that was found: `is_one` tells what they tell."""
        return not self._ones
