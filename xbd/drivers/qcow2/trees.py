"""What hangs on an L1 table, counted and marked as a whole: the work of snapshots.

Source: QEMU's docs/interop/qcow2.rst, "Cluster mapping", "Host cluster management".

Everything here belongs under the image's lock.  Nothing counts what is in an external data file.
Tables are read past the cache of the active ones; who changes them makes it forget.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Final

from xbd.core.driver import Unsupported
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from xbd.drivers.qcow2.metadata_map import MetadataMap
from xbd.drivers.qcow2.refcounts import LARGEST_OFFSET, Refcounts
from xbd.drivers.qcow2.tables import load_table, pack_table
from xbd.drivers.qcow2.writing import compressed_clusters

_MOST_CLUSTERS: Final = 1 << 18
"""Counted at a time: some 10 MiB of memory."""

_NOT_COPIED: Final = ~COPIED & (1 << 64) - 1


def require_sound(image: Image, l1: Sequence[int]) -> None:
    """Raise `CorruptImage` if `drop_uses` would, but for counts."""
    for _ in batches(image, l1):
        pass


def drop_uses(image: Image, l1: Sequence[int]) -> None:
    """Count one use less of everything on this L1 table, which nothing durable names any more.

    What nobody uses then is given back.  Raises `CorruptImage` if something was not counted.
    """
    for clusters in batches(image, l1):
        image.refcounts.free_many(clusters)


def unflagged(image: Image, table: array[int]) -> array[int]:
    """An L2 table's entries, none of which may be written in place."""
    return array("Q", [word & _NOT_COPIED for word in _entries(image, table)])


def flagged(image: Image, table: array[int], counts: Refcounts) -> array[int]:
    """An L2 table's entries, with flags as these counts have it."""
    entries = unflagged(image, table)
    places = [
        place
        for place, entry in enumerate(entries)
        if entry & OFFSET_MASK and not entry & COMPRESSED
    ]
    clusters = [cluster_of(image, entries[place]) for place in places]
    for place, count in zip(places, counts.get_many(clusters), strict=True):
        if count == 1:
            entries[place] |= COPIED
    return entries


def set_entries(image: Image, table: array[int], entries: array[int]) -> bool:
    """Change an L2 table in memory; whether anything is different."""
    step = image.header.l2_entry_bytes // 8
    if table[::step] == entries:
        return False
    table[::step] = entries
    return True


def mark(image: Image) -> None:
    """Say in the active tables, where they are, what only they use."""
    tables = image.tables
    for index, entry in enumerate(tables.l1):
        if entry & OFFSET_MASK and image.refcounts.get(cluster_of(image, entry)) == 1:
            table = _load(image, entry)
            if set_entries(image, table, flagged(image, table, image.refcounts)):
                image.host.write(entry & OFFSET_MASK, pack_table(table))
            if not entry & COPIED:
                tables.set_l1(index, entry | COPIED)
    tables.forget_cached()


def batches(image: Image, l1: Sequence[int]) -> Iterator[list[int]]:
    """All that hangs on an L1 table: ascending clusters, one for each use.

    Raises `CorruptImage` if it can't be, or `Unsupported`.
    """
    used = [entry & OFFSET_MASK for entry in l1 if entry & OFFSET_MASK]
    if len(set(used)) < len(used):
        # Counts can be right even so, but following them all could take for ever.
        raise Unsupported(
            f"{image}: an L1 table names an L2 table twice: convert the image to use snapshots"
        )
    active = MetadataMap()
    active.replace(cluster_of(image, entry) for entry in image.tables.l1 if entry & OFFSET_MASK)
    tables: list[int] = []
    contents: list[int] = []
    for entry in l1:
        if entry & OFFSET_MASK:
            table = cluster_of(image, entry)
            if not active.overlaps(table):
                image.require_data([table])
            tables.append(table)
            contents += _contents(image, entry)
        if len(contents) >= _MOST_CLUSTERS:
            yield _checked(image, tables, contents)
            tables, contents = [], []
    yield _checked(image, tables, contents)


def _checked(image: Image, tables: list[int], contents: list[int]) -> list[int]:
    """All of them, ascending."""
    contents.sort()
    image.require_data(contents)
    return sorted(tables + contents)


def _contents(image: Image, l1_entry: int) -> list[int]:
    """The clusters that an L2 table names, one for each use."""
    if image.header.has_data_file:
        return []
    entries = _entries(image, _load(image, l1_entry))
    offsets = [word & OFFSET_MASK for word in entries if not word & COMPRESSED]
    bits = image.header.cluster_bits
    if reduce(or_, offsets, 0) & image.header.cluster_size - 1:
        where = l1_entry & OFFSET_MASK
        raise CorruptImage(f"{image}: the L2 table at {where:#x} names a place inside a cluster")
    clusters = [offset >> bits for offset in offsets if offset]
    if len(offsets) < len(entries):
        for word in entries:
            if word & COMPRESSED:
                clusters += compressed_clusters(image, word)
    return clusters


def cluster_of(image: Image, entry: int) -> int:
    """Which an uncompressed entry names."""
    offset = entry & OFFSET_MASK
    if offset & image.header.cluster_size - 1 or offset >= LARGEST_OFFSET:
        raise CorruptImage(f"{image}: a table names a cluster at {offset:#x}")
    return offset >> image.header.cluster_bits


def _load(image: Image, l1_entry: int) -> array[int]:
    cluster_of(image, l1_entry)
    return load_table(image.host, l1_entry & OFFSET_MASK, image.header.cluster_size // 8)


def _entries(image: Image, table: array[int]) -> array[int]:
    """Without the bitmaps of subclusters."""
    return table[::2] if image.header.extended_l2 else table[:]
