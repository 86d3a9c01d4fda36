"""Where everything lies in a new image, and the bytes of its tables.

A new image is: header, refcount table, refcount blocks, L1 table, LUKS header; preallocated, also
L2 tables and then data, in the disk's order.  Every cluster is used exactly once.

Source: QEMU's docs/interop/qcow2.rst, "Host cluster management" and "Cluster mapping".
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Final

import attrs

from xbd.core.driver import ConfigError
from xbd.core.units import MIB
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.layout import COPIED, ZERO

_SWAP: Final = sys.byteorder == "little"
_PIECE: Final = MIB

_MAX_HOST_OFFSET: Final = 1 << 56
"""An L2 entry has no room for more."""


@attrs.frozen(kw_only=True)
class NewLayout:
    """Numbers are clusters; each part begins where the one before it ends."""

    cluster_size: int
    refcount_table: int
    refcount_blocks: int
    l1: int
    luks: int
    l2: int
    data: int
    """In this file; 0 with an external data file."""

    @property
    def refcount_table_at(self) -> int:
        return 1

    @property
    def refcount_blocks_at(self) -> int:
        return self.refcount_table_at + self.refcount_table

    @property
    def l1_at(self) -> int:
        return self.refcount_blocks_at + self.refcount_blocks

    @property
    def luks_at(self) -> int:
        return self.l1_at + self.l1

    @property
    def l2_at(self) -> int:
        return self.luks_at + self.luks

    @property
    def data_at(self) -> int:
        return self.l2_at + self.l2

    @property
    def end(self) -> int:
        return self.data_at + self.data


def l1_entries(header: Header) -> int:
    """How many L1 entries the disk needs; raises `ConfigError` if it is too large."""
    entries = -(-header.size // header.l1_coverage)
    if entries * 8 > layout.MAX_L1_BYTES:
        most = layout.MAX_L1_BYTES // 8 * header.l1_coverage
        raise ConfigError(
            f"a disk of {header.size} bytes is too large for clusters of {header.cluster_size}, "
            f"with which it has {most} at most: choose a larger cluster-size"
        )
    return entries


def plan(header: Header, *, luks_bytes: int, preallocated: bool, data_here: bool) -> NewLayout:
    """Lay out an image for the sizes and widths in `header`; raises `ConfigError`."""
    cluster = header.cluster_size
    entries = l1_entries(header)
    data = -(-header.size // cluster) if preallocated else 0
    new = NewLayout(
        cluster_size=cluster,
        refcount_table=1,
        refcount_blocks=1,
        l1=_clusters(entries * 8, cluster),
        luks=_clusters(luks_bytes, cluster),
        l2=entries if preallocated else 0,
        data=data if data_here else 0,
    )
    # Counts have counts, too: until it fits.
    while True:
        blocks = -(-new.end // header.refcount_block_entries)
        table = _clusters(blocks * 8, cluster)
        if (blocks, table) == (new.refcount_blocks, new.refcount_table):
            break
        new = attrs.evolve(new, refcount_blocks=blocks, refcount_table=table)
    if (
        new.refcount_table * cluster > layout.MAX_REFCOUNT_TABLE_BYTES
        or new.end * cluster > _MAX_HOST_OFFSET
    ):
        raise ConfigError(
            f"{header.size} bytes can't be preallocated in clusters of {cluster} with refcounts "
            f"of {header.refcount_bits} bits: choose a larger cluster-size, or preallocation=off"
        )
    return new


def _clusters(length: int, cluster: int) -> int:
    return -(-length // cluster)


# -- tables, in pieces: (offset in the file, bytes) -------------------------------------------


def refcount_table(new: NewLayout) -> Iterator[tuple[int, bytes]]:
    """Offsets of all refcount blocks."""
    yield from _offsets(
        new.refcount_table_at * new.cluster_size,
        new.refcount_blocks_at * new.cluster_size,
        new.refcount_blocks,
        new.cluster_size,
    )


def refcount_blocks(new: NewLayout, order: int) -> Iterator[tuple[int, bytes]]:
    """A count of 1 for each cluster; the last block's rest is left zero."""
    at = new.refcount_blocks_at * new.cluster_size
    unit = max(1, 8 >> order)  # counts that fill whole bytes
    pattern = _ones(unit, order)
    for first in range(0, new.end - new.end % unit, _PIECE):
        count = min(_PIECE, new.end - new.end % unit - first)
        data = pattern * (count // unit)
        yield at, data
        at += len(data)
    if new.end % unit:
        yield at, _ones(new.end % unit, order)


def _ones(count: int, order: int) -> bytes:
    """`count` counts of 1: big-endian, those of less than a byte from the lowest bits on."""
    width = 1 << order
    if width >= 8:
        return (bytes(width // 8 - 1) + b"\1") * count
    return bytes((sum(1 << place * width for place in range(count)),))


def l1_table(new: NewLayout) -> Iterator[tuple[int, bytes]]:
    """Offsets of all L2 tables, if there are any."""
    yield from _offsets(
        new.l1_at * new.cluster_size,
        COPIED | new.l2_at * new.cluster_size,
        new.l2,
        new.cluster_size,
    )


def l2_tables(
    new: NewLayout, first_data: int, clusters: int, *, extended: bool, zero: bool
) -> Iterator[tuple[int, bytes]]:
    """Entries for `clusters` clusters that lie from `first_data` (an offset) on.

    `extended`: with no part of a cluster in use yet, as QEMU does it: the backing file still
    shows, and otherwise zeroes.  `zero`: whatever lies there, they read as zeroes.
    """
    at = new.l2_at * new.cluster_size
    first = COPIED | first_data
    if not extended:
        yield from _offsets(at, first | (ZERO if zero else 0), clusters, new.cluster_size)
        return
    for offset, data in _offsets(0, first, clusters, new.cluster_size):
        entries = array("Q", bytes(2 * len(data)))
        entries[0::2] = array("Q", data)
        yield at + 2 * offset, entries.tobytes()


def _offsets(at: int, first: int, count: int, step: int) -> Iterator[tuple[int, bytes]]:
    """A big-endian table of `first`, `first` + `step`... beginning at file offset `at`."""
    per_piece = _PIECE // 8
    for done in range(0, count, per_piece):
        part = min(per_piece, count - done)
        values = array("Q", range(first + done * step, first + (done + part) * step, step))
        if _SWAP:
            values.byteswap()
        yield at + done * 8, values.tobytes()
