"""Numbers of the block interface (xen/include/public/io/blkif.h)."""

from __future__ import annotations

from typing import Final

SECTOR: Final = 512
"""Bytes in the protocol's unit of addresses and lengths, whatever the device's sectors are."""
SECTORS_PER_PAGE: Final = 8

READ: Final = 0
WRITE: Final = 1
WRITE_BARRIER: Final = 2
FLUSH_DISKCACHE: Final = 3
DISCARD: Final = 5
INDIRECT: Final = 6

RSP_OKAY: Final = 0
RSP_ERROR: Final = -1
RSP_EOPNOTSUPP: Final = -2

MAX_SEGMENTS: Final = 11
"""Segments of a direct request."""
MAX_INDIRECT_PAGES: Final = 8
SEGMENTS_PER_INDIRECT_PAGE: Final = 512

DISCARD_SECURE: Final = 1
"""Bit 0 of a discard's flag."""

VDISK_CDROM: Final = 1
VDISK_REMOVABLE: Final = 2
VDISK_READONLY: Final = 4
