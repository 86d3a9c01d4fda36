"""Switching an image to other tables by one write of its header.

Source: QEMU's docs/interop/qcow2.rst, "Header".

The L1 table, the refcount table and the snapshot table are all named in the header's first sector.
So what is to change is written elsewhere, with counts and flags as they will be; when it is durable
the header is replaced, and then what only the old one named is given up.  Killed at any time, the
image is what it was or what it was to become, but for clusters that are leaked.

All of it belongs under the image's lock.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

from xbd.core.driver import NoSpace
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import COPIED, OFFSET_MASK, Incompatible
from xbd.drivers.qcow2.refcounts import Refcounts, runs
from xbd.drivers.qcow2.tables import load_table, pack_table
from xbd.drivers.qcow2.trees import (
    batches,
    cluster_of,
    drop_uses,
    flagged,
    mark,
    require_sound,
    set_entries,
    unflagged,
)


@attrs.frozen(kw_only=True)
class Change:
    """What is to become of an image.  Trees are L1 tables with all that hangs on them."""

    l1: array[int]
    """What the disk will be; flags don't matter."""
    add: Sequence[int] = ()
    """A tree that is used once more."""
    drop: Sequence[int] = ()
    """A tree that is used once less."""
    free: Sequence[int] = ()
    """Host clusters that nothing names any more."""
    shared: bool
    """All that the disk has is used by something else as well."""
    snapshots: tuple[int, bytes] | None = None
    """How many, and their table; None: as it is."""
    size: int | None = None
    """Of the disk, if it changes."""


def switch(image: Image, change: Change) -> None:
    """Carry it out.  Raises `DriverError`: nothing has changed unless the host fails in the end."""
    _give_up_old(image, change, put_into_force(image, change))


def make_room(image: Image, change: Change) -> None:
    """`switch`, and if the host has no room for it, in place."""
    try:
        new = put_into_force(image, change)
    except NoSpace:
        _switch_in_place(image, change)
    else:
        _give_up_old(image, change, new)


def put_into_force(image: Image, change: Change) -> _Counted:
    """All of it but for giving up what was there before.  Raises `DriverError`: nothing has
    changed then."""
    packed = change.snapshots[1] if change.snapshots is not None else b""
    with _new_clusters(image, len(change.l1) * 8, len(packed)) as (l1_offset, table_offset):
        used = sum(1 for entry in change.l1 if entry & OFFSET_MASK)
        places = image.refcounts.take_many(used)
        taken = list(places)
        try:
            new = _Counted(image, change, places)
            taken += new.counts.clusters()
            for offset, data in ((l1_offset, pack_table(new.l1)), (table_offset, packed)):
                if data:
                    image.host.write(offset, data)
            image.host.flush()
            image.update_header(
                **_header_changes(image, change, l1_offset, table_offset, new.counts)
            )
        except BaseException:
            image.refcounts.release(taken)
            raise
    _activate(image, new, l1_offset)
    return new


def _give_up_old(image: Image, change: Change, new: _Counted) -> None:
    unused = sorted([*new.old_counts, *new.places, *change.free])
    image.refcounts.give_space_back(new.emptied)
    image.refcounts.free_many(unused)


class _Counted:
    """Counts and tables as they will be, written to new places."""

    def __init__(self, image: Image, change: Change, places: list[int]) -> None:
        """`places` are host clusters for L2 tables; those that are not needed stay in it."""
        self._image = image
        self.places = places
        self.counts: Refcounts = image.refcounts.copied()
        self.emptied: list[tuple[int, int]] = []
        """Runs of clusters that nobody will use."""
        self.old_counts = image.refcounts.clusters()
        try:
            for clusters in batches(image, change.add):
                self.counts.change_many(clusters, 1)
            for clusters in batches(image, change.drop):
                self.emptied += runs(self.counts.change_many(clusters, -1))
            self.l1 = array("Q", [self._linked(entry, change.shared) for entry in change.l1])
            self.counts.write()
        except BaseException:
            image.refcounts.release(self.counts.clusters())
            raise

    def _linked(self, entry: int, shared: bool) -> int:
        """The L1 entry of an L2 table, which is copied if its flags are not right."""
        if not entry & OFFSET_MASK:
            return 0
        image, bits = self._image, self._image.header.cluster_bits
        cluster = cluster_of(image, entry)
        table = load_table(image.host, cluster << bits, image.header.cluster_size // 8)
        entries = unflagged(image, table) if shared else flagged(image, table, self.counts)
        if not set_entries(image, table, entries):
            alone = self.counts.get(cluster) == 1
            return cluster << bits | (COPIED if alone else 0)
        place = self.places.pop()
        image.host.write(place << bits, pack_table(table))
        if self.counts.change(cluster, -1) == 0:
            self.emptied.append((cluster, 1))
        return place << bits | COPIED


def _header_changes(
    image: Image, change: Change, l1_offset: int, table_offset: int, counts: Refcounts
) -> dict[str, Any]:
    table = counts.table_clusters()
    changes: dict[str, Any] = {
        "l1_size": len(change.l1),
        "l1_table_offset": l1_offset,
        "refcount_table_offset": table.start << image.header.cluster_bits,
        "refcount_table_clusters": len(table),
    }
    if change.snapshots is not None:
        changes |= {"nb_snapshots": change.snapshots[0], "snapshots_offset": table_offset}
    return changes if change.size is None else changes | {"size": change.size}


@contextmanager
def _new_clusters(image: Image, *lengths: int) -> Iterator[list[int]]:
    """Host offsets for tables of so many bytes (0 for none); taken back if the block raises.

    What lies there are zeroes, and durable.
    """
    bits = image.header.cluster_bits
    taken: list[range] = []
    try:
        for length in lengths:
            count = -(-length >> bits)
            first = image.refcounts.take_run(count) if count else 0
            taken.append(range(first, first + count))
            image.metadata.add(first, count)
        yield [clusters.start << bits for clusters in taken]
    except BaseException:
        for clusters in taken:
            image.metadata.remove(clusters.start, len(clusters))
            image.refcounts.release(clusters)
        raise


def _activate(image: Image, new: _Counted, l1_offset: int) -> None:
    """The header names other tables: so does the memory."""
    tables, bits = image.tables, image.header.cluster_bits
    for entry in tables.l1:
        if entry & OFFSET_MASK:
            image.metadata.remove((entry & OFFSET_MASK) >> bits)
    for cluster in new.old_counts:
        image.metadata.remove(cluster)
    for cluster in new.counts.clusters():
        image.metadata.add(cluster)
    for entry in new.l1:
        if entry & OFFSET_MASK:
            image.metadata.add((entry & OFFSET_MASK) >> bits)
    image.refcounts.become(new.counts)
    tables.l1, tables.l1_offset = new.l1, l1_offset
    tables.forget_cached()
    # What was packed where something is given up may be replaced now.
    image.clusters.clear()
    image.packed_until = 0


def table_clusters(image: Image, offset: int, length: int) -> range:
    """The host clusters in which a table of so many bytes lies."""
    first = offset >> image.header.cluster_bits
    return range(first, first + -(-length >> image.header.cluster_bits))


# -- where there is no room for that -----------------------------------------------------------


def _switch_in_place(image: Image, change: Change) -> None:
    """As `switch`, for what makes room, in a few clusters: nothing is added then.

    Counts and flags are corrected where they are.  Until they are right version 3 says that the
    image is dirty, and who opens it puts them right; of version 2, clusters may be leaked.
    """
    require_sound(image, change.drop)
    image.flush()
    packed = change.snapshots[1] if change.snapshots is not None else b""
    empty = not any(change.l1)
    l1_bytes = len(change.l1) * 8 if empty else 0
    old_l1 = table_clusters(image, image.tables.l1_offset, len(image.tables.l1) * 8)
    with _new_clusters(image, l1_bytes, len(packed)) as (l1_offset, table_offset):
        if packed:
            image.host.write(table_offset, packed)
        image.host.flush()
        changes: dict[str, Any] = {}
        if change.snapshots is not None:
            changes |= {"nb_snapshots": change.snapshots[0], "snapshots_offset": table_offset}
        if empty:
            changes["l1_table_offset"] = l1_offset
        _change_header(image, dirty=True, **changes)
    free = sorted(change.free)
    if empty:
        for entry in image.tables.l1:
            if entry & OFFSET_MASK:
                image.metadata.remove((entry & OFFSET_MASK) >> image.header.cluster_bits)
        image.tables.l1, image.tables.l1_offset = change.l1, l1_offset
        image.tables.forget_cached()
    else:
        free = [cluster for cluster in free if cluster not in old_l1]
    image.clusters.clear()
    image.packed_until = 0
    drop_uses(image, change.drop)
    image.refcounts.free_many(free)
    mark(image)
    image.host.flush()
    _change_header(image, dirty=False)


def _change_header(image: Image, *, dirty: bool, **changes: Any) -> None:
    """Durably; `dirty`: until it is said again without, refcounts and flags may be wrong."""
    incompatible = image.header.incompatible
    if image.header.version >= 3:
        incompatible &= ~Incompatible.DIRTY
        incompatible |= Incompatible.DIRTY if dirty else 0
    if changes or incompatible != image.header.incompatible:
        image.update_header(incompatible=incompatible, **changes)
