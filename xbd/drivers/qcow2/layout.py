"""Numbers of the qcow2 format: magic, feature bits, entries of tables, and limits.

Source of everything here: QEMU's docs/interop/qcow2.rst, by its section names.
"""

from __future__ import annotations

import enum
from typing import Final

from xbd.core.units import MIB

MAGIC: Final = 0x514649FB
"""``QFI\\xfb``."""

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MAX_REFCOUNT_ORDER: Final = 6

# What QEMU refuses to load; sizes in bytes.
MAX_L1_BYTES: Final = 32 * MIB
MAX_REFCOUNT_TABLE_BYTES: Final = 8 * MIB
MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_TABLE_BYTES: Final = 64 * MIB
MAX_BACKING_NAME_BYTES: Final = 1023
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_BYTES: Final = 64 * MIB

SUBCLUSTERS: Final = 32
"""In a cluster of an image with extended L2 entries."""

SECTOR: Final = 512
"""Unit of compressed clusters' lengths, and of encryption."""


class Incompatible(enum.IntFlag):
    """Header, "incompatible_features"."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(enum.IntFlag):
    """Header, "compatible_features"."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(enum.IntFlag):
    """Header, "autoclear_features"."""

    BITMAPS = 1 << 0
    RAW_EXTERNAL_DATA = 1 << 1


class CryptMethod(enum.IntEnum):
    """Header, "crypt_method"."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(enum.IntEnum):
    """Header, "compression_type"."""

    ZLIB = 0
    """Raw deflate, with a window of 4 KiB when written."""
    ZSTD = 1


class ExtensionType(enum.IntEnum):
    """Header extensions."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


# Cluster mapping: L1 table entry, L2 table entry, standard cluster descriptor.
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
COPIED: Final = 1 << 63
"""The refcount is exactly 1: the cluster may be written in place."""
COMPRESSED: Final = 1 << 62
ZERO: Final = 1 << 0
"""Version 3 without extended L2 entries: reads as zeroes, with a host cluster or without."""
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE

# Extended L2 entries: bit n of the second word says that subcluster n is allocated, bit 32 + n
# that it reads as zeroes.
ALL_ALLOCATED: Final = 0x0000_0000_FFFF_FFFF
ALL_ZERO: Final = 0xFFFF_FFFF_0000_0000

REFCOUNT_TABLE_RESERVED: Final = 0x1FF


def compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset of a compressed cluster's bytes, and how many they are at most.

    The length counts 512-byte sectors beyond the one in which the data begins.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = (entry >> shift & ((1 << (cluster_bits - 8)) - 1)) + 1
    return offset, sectors * SECTOR - offset % SECTOR


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of `length` compressed bytes at host `offset`."""
    shift = 62 - (cluster_bits - 8)
    sectors = (offset % SECTOR + length - 1) // SECTOR
    return COMPRESSED | sectors << shift | offset


def is_aligned(offset: int, unit: int) -> bool:
    return offset % unit == 0
