"""How often an image's metadata name each host cluster.

Source: QEMU's docs/interop/qcow2.rst, "Host cluster management".

Memory: one number per cluster of the file, as wide as the image's refcounts (a byte at least),
and of that only the pages in which something is counted; never more than `MOST_BYTES`.
"""

from __future__ import annotations

import mmap
from array import array
from errno import EFBIG, ENOMEM
from typing import Final, Literal

from xbd.core.driver import DriverError
from xbd.core.units import GIB
from xbd.drivers.qcow2.header import Header

MOST_BYTES: Final = GIB
"""Enough for 32 TiB of clusters of 64 KiB with refcounts of 16 bits."""

Code = Literal["B", "H", "I", "Q"]
_WIDTHS: Final = {"B": 1, "H": 2, "I": 4, "Q": 8}

CODES: Final[dict[int, Code]] = {0: "B", 1: "B", 2: "B", 3: "B", 4: "H", 5: "I", 6: "Q"}
"""By refcount order: what holds a count in memory."""


def zeroed(count: int, code: Code) -> memoryview[int]:
    """So many numbers; a page of them takes memory once it is written to.

    Raises `DriverError`.
    """
    size = max(1, count) * _WIDTHS[code]
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DriverError(f"no {size} bytes of memory: {error.strerror}", errno=ENOMEM) from error
    return memoryview(pages).cast(code)


class References:
    """Counts, by host cluster."""

    def __init__(self, header: Header, file_size: int) -> None:
        """Raises `DriverError` with EFBIG for a file of too many clusters."""
        self.bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.file_size = file_size
        self.clusters = -(-file_size // header.cluster_size)
        """Of the file; only these can be named."""
        self.code = CODES[header.refcount_order]
        self.largest = (1 << header.refcount_bits) - 1
        """What the image's refcounts can say."""
        self._most = (1 << 8 * _WIDTHS[self.code]) - 1
        self._clamp = bytes(min(count, self.largest) for count in range(256))
        # The last compressed cluster may end behind the last cluster, but not far.
        size = self.clusters + 2
        if size * _WIDTHS[self.code] > MOST_BYTES:
            raise DriverError(
                f"a file of {self.clusters} clusters is too large to be checked: convert it to an "
                "image with larger clusters",
                errno=EFBIG,
            )
        self.counts = zeroed(size, self.code)
        self.end = self.clusters
        """Behind the last cluster of the file, and behind the last one that is counted."""
        self.overflows = 0
        """References that the image's refcounts are too narrow to count."""

    def fits(self, offset: int, length: int) -> bool:
        """Whether a range lies in the file, of whose last cluster a part may be missing."""
        return offset + length - self.file_size < self.cluster_size

    def add(self, offset: int, length: int, times: int = 1) -> bool:
        """Count every cluster of a range; False: it reaches beyond the file, and is not counted."""
        if not length:
            return True
        if not self.fits(offset, length):
            return False
        last = offset + length - 1 >> self.bits
        for cluster in range(offset >> self.bits, last + 1):
            self.add_cluster(cluster, times)
        self.end = max(self.end, last + 1)
        return True

    def add_cluster(self, cluster: int, times: int = 1) -> None:
        """Count a cluster of the file."""
        before = self.counts[cluster]
        count = before + times
        if count > self.largest:
            self.overflows += count - max(before, self.largest)
        self.counts[cluster] = min(count, self._most)

    def refcounts(self, first: int, count: int) -> array[int]:
        """What the refcounts of these clusters should be; behind the end they are 0."""
        part = self.counts[first : max(first, min(first + count, self.end))].tobytes()
        if self.code == "B":
            part = part.translate(self._clamp)
        refcounts = array(self.code, part)
        refcounts.frombytes(bytes((count - len(refcounts)) * refcounts.itemsize))
        return refcounts
