"""New refcount structures, where the old ones can't be put right in place.

Source: QEMU's docs/interop/qcow2.rst, "Host cluster management" and "Header".

They are written where nothing is, together with a new snapshot table if one is needed, and made
durable; then one write of the header's first sector puts them into force.  Killed before that, the
image is what it was.
"""

from __future__ import annotations

import errno
import struct
import sys
from array import array
from collections.abc import Iterable
from typing import Final

import attrs

from xbd.core.driver import DriverError, NoSpace
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import Autoclear
from xbd.drivers.qcow2.refcount_block import RefcountBlock
from xbd.drivers.qcow2.references import References, zeroed

_TABLES: Final = struct.Struct(">QIIQ")
_TABLES_AT: Final = 48
"""In the header: refcount table, its clusters, number of snapshots, snapshot table."""
_AUTOCLEAR_AT: Final = 88
_HEADER_BYTES: Final = 104
"""Among them is all that may change; a sector is written whole or not at all."""


@attrs.frozen(kw_only=True)
class _Plan:
    """Where the new parts go: the refcount table, its blocks, the snapshot table."""

    start: int
    """A cluster; the parts follow each other."""
    table_clusters: int
    blocks: list[int]
    """Their places in the refcount table."""
    snapshot_clusters: int

    @property
    def clusters(self) -> int:
        return self.table_clusters + len(self.blocks) + self.snapshot_clusters

    @property
    def end(self) -> int:
        return self.start + self.clusters


class Rebuild:
    """Of one image.  `references` count everything but the refcount structures."""

    def __init__(
        self,
        host: Host,
        header: Header,
        references: References,
        *,
        in_force: Iterable[tuple[int, int]],
        snapshots: tuple[int, bytes] | None,
        drop_bitmaps: bool,
    ) -> None:
        """`in_force`: ranges, in bytes, that are not to be written to before the header is.
        `snapshots`: how many, and their new table; None: the old one stays."""
        self._host = host
        self._header = header
        self._references = references
        self._entries = header.refcount_block_entries
        self._snapshots = snapshots
        self._drop_bitmaps = drop_bitmaps
        self._taken = zeroed(references.clusters, "B")
        for offset, length in in_force:
            first = offset >> header.cluster_bits
            last = min(offset + length - 1 >> header.cluster_bits, references.clusters - 1)
            for cluster in range(first, last + 1):
                self._taken[cluster] = 1
        self._used = [
            index
            for index in range(-(-references.end // self._entries))
            if any(references.refcounts(index * self._entries, self._entries).tobytes())
        ]

    def run(self) -> None:
        """Raises `DriverError`: `NoSpace` where the host has none."""
        plan = self._make_room()
        bits = self._header.cluster_bits
        table = array("Q", bytes(plan.table_clusters << bits))
        place = plan.start + plan.table_clusters
        for index in plan.blocks:
            self._host.write(place << bits, self._pack_block(index, plan))
            table[index] = place << bits
            place += 1
        if plan.snapshot_clusters and self._snapshots is not None:
            self._host.write(place << bits, self._snapshots[1])
        if sys.byteorder == "little":
            table.byteswap()
        self._host.write(plan.start << bits, table.tobytes())
        self._host.flush()
        self._put_into_force(plan, place << bits)

    def _pack_block(self, index: int, plan: _Plan) -> bytes:
        entries = self._entries
        block = RefcountBlock(bytes(self._header.cluster_size), self._header.refcount_order)
        first = index * entries
        block.counts = self._references.refcounts(first, entries)
        for cluster in range(max(first, plan.start), min(first + entries, plan.end)):
            block.counts[cluster - first] = 1
        return block.pack(0, entries)

    def _put_into_force(self, plan: _Plan, snapshots_at: int) -> None:
        header, bits = self._header, self._header.cluster_bits
        number, offset = header.nb_snapshots, header.snapshots_offset
        if self._snapshots is not None:
            number = self._snapshots[0]
            offset = snapshots_at if number else 0
        first = self._host.read(0, _HEADER_BYTES)
        _TABLES.pack_into(
            first, _TABLES_AT, plan.start << bits, plan.table_clusters, number, offset
        )
        if self._drop_bitmaps:
            autoclear = header.autoclear & ~Autoclear.BITMAPS
            first[_AUTOCLEAR_AT : _AUTOCLEAR_AT + 8] = autoclear.to_bytes(8, "big")
        self._host.write(0, first)
        self._host.flush()

    # -- room ---------------------------------------------------------------------------------

    def _make_room(self) -> _Plan:
        """At the file's end, if it can grow: what was lost inside it may still be looked for."""
        plan = self._plan(max(self._references.end, self._references.clusters))
        try:
            self._host.grow(plan.end << self._header.cluster_bits)
        except NoSpace:
            inside = self._plan_inside()
            if inside is None:
                raise
            return inside
        return plan

    def _plan(self, start: int) -> _Plan:
        header = self._header
        snapshot_clusters = 0
        if self._snapshots is not None:
            snapshot_clusters = -(-len(self._snapshots[1]) // header.cluster_size)
        needed = set(self._used)
        size = 0
        while True:
            blocks = sorted(needed)
            table_clusters = -(-(blocks[-1] + 1) * 8 // header.cluster_size)
            plan = _Plan(
                start=start,
                table_clusters=table_clusters,
                blocks=blocks,
                snapshot_clusters=snapshot_clusters,
            )
            if plan.clusters == size:
                break
            size = plan.clusters
            needed.update(range(start // self._entries, (plan.end - 1) // self._entries + 1))
        table_bytes = table_clusters * header.cluster_size
        if table_bytes > layout.MAX_REFCOUNT_TABLE_BYTES and table_clusters > 1:
            raise DriverError("a refcount table would need more than 8 MiB", errno=errno.EFBIG)
        return plan

    def _plan_inside(self) -> _Plan | None:
        """In the first free run that is long enough; None: there is none."""
        references = self._references
        free = start = 0
        plan = self._plan(1)
        for cluster in range(1, references.clusters):
            if references.counts[cluster] or self._taken[cluster]:
                free = 0
                continue
            if not free:
                start = cluster
            free += 1
            if free >= plan.clusters:
                plan = self._plan(start)
                if free >= plan.clusters:
                    return plan
        return None
