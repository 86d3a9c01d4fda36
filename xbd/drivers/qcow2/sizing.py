"""Making an image's disk larger or smaller.

Killed in between, the disk has its old size; shrinking may have made zeroes of its end by then.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress

import attrs

from xbd.core.driver import DriverError
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.bitmaps import directory_of
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.sparse import used_entries
from xbd.drivers.qcow2.tables import Kind
from xbd.drivers.qcow2.zeroing import Zeroer


def size_problem(header: Header) -> str | None:
    """Why the disk can't have another size, after the image's name; None: it can."""
    if header.version < 3 and header.nb_snapshots:
        return (
            "has snapshots, which in version 2 (compat=0.10) can't have another size than the "
            "disk: delete them first"
        )
    if directory_of(header) is not None:
        return (
            "has dirty bitmaps, which would not fit any more: remove them first (qemu-img bitmap "
            "--remove)"
        )
    return None


def set_size(image: Image, zeroer: Zeroer, size: int) -> None:
    """Make the disk `size` bytes long; what is new reads as zeroes.

    Nobody may use what is cut off.  Raises `DriverError`; the size is as it was then.
    """
    with image.lock:
        image.require_writable()
        problem = size_problem(image.header)
        if problem is not None and size != image.size:
            raise DriverError(f"{image} {problem}", errno=errno.EINVAL)
        if size < image.size:
            # Before it goes: it must not come back when the disk grows again.
            zeroer.zero(size, image.size - size, may_unmap=True)
            image.flush()
            image.update_header(size=size)
            if image.header.raw_data_file:
                image.data_host.shrink(size)
        elif size > image.size:
            _grow(image, zeroer, size)


def _grow(image: Image, zeroer: Zeroer, size: int) -> None:
    _extend_l1(image, -(-size // image.header.l1_coverage))
    old = image.header
    if old.raw_data_file:
        image.data_host.grow(size)
    image.header = attrs.evolve(old, size=size)
    try:
        for start, stop in _stale(image, old.size, size):
            zeroer.zero(start, stop - start, may_unmap=True)
        image.flush()
    finally:
        image.header = attrs.evolve(image.header, size=old.size)
        if image.broken is not None:  # and that was written into the header, with the new size
            with suppress(DriverError):
                image.update_header()
    image.update_header(size=size)


def _stale(image: Image, old: int, new: int) -> Iterator[tuple[int, int]]:
    """What behind the disk's old end must not show: beginnings and ends."""
    header = image.header
    # The backing file may reach beyond it, and there may be anything in the last cluster, of a disk
    # that was larger once.
    cluster_end = old + -old % header.cluster_size
    backing_end = 0 if image.backing is None else image.backing.size
    at = min(max(cluster_end, backing_end), new)
    if old < at:
        yield old, at
    # What is mapped farther behind is the state of a guest, from a snapshot that was applied.
    for index, _ in used_entries(image.tables.l1, at // header.l1_coverage):
        start = max(at, index * header.l1_coverage)
        stop = min(new, (index + 1) * header.l1_coverage)
        for piece in image.pieces(start, max(stop - start, 0)):
            if piece.kind not in (Kind.UNALLOCATED, Kind.ZERO):
                yield piece.offset, piece.offset + piece.length


def _extend_l1(image: Image, entries: int) -> None:
    """Give the L1 table at least so many entries; it moves then."""
    if entries * 8 > layout.MAX_L1_BYTES:
        raise DriverError(f"{image}: the disk would need an L1 table larger than 32 MiB")
    if entries <= len(image.tables.l1):
        return
    bits = image.header.cluster_bits
    old_offset, old_bytes = image.tables.l1_offset, len(image.tables.l1) * 8
    clusters = -(-entries * 8 >> bits)
    first = image.refcounts.take_run(clusters)
    image.metadata.add(first, clusters)
    try:
        image.tables.copy_l1(first << bits)
        image.host.flush()
        image.update_header(l1_size=entries, l1_table_offset=first << bits)
    except DriverError:
        image.refcounts.release(range(first, first + clusters))
        raise
    image.tables.move_l1(first << bits, entries)
    if old_bytes:
        old = range(old_offset >> bits, -(-(old_offset + old_bytes) >> bits))
        image.metadata.remove(old.start, len(old))
        image.refcounts.release(old)
