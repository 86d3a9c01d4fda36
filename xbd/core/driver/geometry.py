"""What makes a geometry a possible one, and the unit that requests to a driver come in."""

from __future__ import annotations

from typing import Final

from xbd.core.driver.api import Geometry
from xbd.core.units import MIB

SMALLEST_BLOCK: Final = 512
"""blkif counts in these, whatever the disk's own block."""

LARGEST_ALIGNMENT: Final = MIB


def geometry_problem(geometry: Geometry) -> str | None:
    """Why no disk can have this geometry, in one line; None: it is fine."""
    for name in ("logical_block", "physical_block", "request_alignment", "memory_alignment"):
        value = getattr(geometry, name)
        if not 0 < value <= LARGEST_ALIGNMENT or value & (value - 1):
            return f"{name} is {value}, not a power of two up to {LARGEST_ALIGNMENT}"
    if geometry.logical_block < SMALLEST_BLOCK:
        return f"logical_block is {geometry.logical_block}, less than {SMALLEST_BLOCK}"
    if geometry.physical_block < geometry.logical_block:
        return "physical_block is smaller than logical_block"
    if not 0 <= geometry.size < 1 << 63 or geometry.size % geometry.logical_block:
        return f"size is {geometry.size}, not a multiple of logical_block"
    if geometry.max_transfer < request_unit(geometry):
        return f"max_transfer is {geometry.max_transfer}, less than one aligned request"
    if geometry.discard_granularity < 0:
        return "discard_granularity is negative"
    if not 0 <= geometry.discard_alignment < max(geometry.discard_granularity, 1):
        return "discard_alignment is not less than discard_granularity"
    return None


def request_unit(geometry: Geometry) -> int:
    """Bytes that offsets and lengths of a driver's calls are multiples of.

    Buffers whose lengths are multiples of `memory_alignment` make up requests that are, too.
    """
    return max(geometry.logical_block, geometry.request_alignment, geometry.memory_alignment)
