"""Where an image's metadata lie, and that no two of them lie in one place.

Looked at before anything is written: who writes to a table that lies over another destroys both.
The parts are those of QEMU's overlap checks: all but the L2 tables that only snapshots have.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from xbd.core.units import GIB
from xbd.drivers.qcow2.bitmaps import directory_of
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.layout import OFFSET_MASK, CryptMethod, ExtensionType
from xbd.drivers.qcow2.snapshot_table import load_snapshots, pack_snapshots

if TYPE_CHECKING:
    from xbd.drivers.qcow2.image import Image

MOST_SNAPSHOT_L1_BYTES: Final = GIB
"""In all of an image's snapshots; those of a disk of 16 TiB need 256 KiB each."""


def encryption_header(header: Header) -> tuple[int, int] | None:
    """Offset and length in bytes; None: there is none.  Raises `CorruptImage`."""
    data = header.extension(ExtensionType.ENCRYPTION)
    if header.crypt_method != CryptMethod.LUKS or data is None:
        return None
    offset, length = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:16], "big")
    if not offset or offset % header.cluster_size or offset + length >= 1 << 56:
        raise CorruptImage(f"the encryption header can't be at {offset:#x}")
    return offset, length


def locate_metadata(image: Image) -> array[int]:
    """The host clusters that hold metadata, ascending.

    Raises `CorruptImage` if one of them holds two things.
    """
    parts = [(name, array("Q", sorted(clusters))) for name, clusters in _parts(image)]
    found = array("Q", sorted(cluster for _, clusters in parts for cluster in clusters))
    for cluster, other in pairwise(found):
        if cluster == other:
            names = [name for name, clusters in parts if _holds(clusters, cluster)]
            raise CorruptImage(
                f"{_told(names)} at {cluster << image.header.cluster_bits:#x}: mend it with: xbd "
                f"image check --repair all qcow2:{image}, or open it read-only"
            )
    return found


def _told(names: list[str]) -> str:
    if len(names) == 1:
        return f"more than {names[0]} lies"
    return f"{', '.join(names[:-1])} and {names[-1]} lie"


def _holds(clusters: array[int], cluster: int) -> bool:
    at = bisect_left(clusters, cluster)
    return at < len(clusters) and clusters[at] == cluster


def _parts(image: Image) -> Iterator[tuple[str, Iterable[int]]]:
    header = image.header
    bits = header.cluster_bits
    yield "the header", (0,)
    yield "the refcount table", image.refcounts.table_clusters()
    yield "one refcount block", image.refcounts.block_clusters()
    yield "the L1 table", _clusters(header.l1_table_offset, header.l1_size * 8, bits)
    # Two entries may name one L2 table, if they say that it is shared.
    used = (entry & OFFSET_MASK for entry in image.tables.l1)
    yield "an L2 table", {offset >> bits for offset in used if offset}
    if header.nb_snapshots:
        yield from _snapshot_parts(image)
    directory = directory_of(header)
    if directory is not None:
        yield "the bitmap directory", _clusters(directory.offset, directory.size, bits)
    encryption = encryption_header(header)
    if encryption is not None:
        yield "the encryption header", _clusters(*encryption, bits)


def _snapshot_parts(image: Image) -> Iterator[tuple[str, Iterable[int]]]:
    header, bits = image.header, image.header.cluster_bits
    snapshots = load_snapshots(image.host, header)
    yield (
        "the snapshot table",
        _clusters(header.snapshots_offset, len(pack_snapshots(snapshots)), bits),
    )
    places = {(one.l1_table_offset, one.l1_size * 8) for one in snapshots}
    if sum(length for _, length in places) > min(image.host.size(), MOST_SNAPSHOT_L1_BYTES):
        raise CorruptImage("the snapshots' L1 tables are too large together")
    # Nobody writes to these: they may be the same.
    yield "a snapshot's L1 table", {c for place in places for c in _clusters(*place, bits)}


def _clusters(offset: int, length: int, bits: int) -> range:
    return range(offset >> bits, -(-(offset + length) >> bits))
