"""Layouts of the three blkif ABIs (xen/include/public/io/blkif.h; linux common.h of xen-blkback).

=========  ======  =======================================================================
ABI        entry   offsets in a request
=========  ======  =======================================================================
x86_64     112     id 8, sector_number 16, segments 24; discard: nr_sectors 24;
                   indirect: handle 24, grefs 28
x86_32     108     id 4, sector_number 12, segments 20; discard: nr_sectors 20;
                   indirect: handle 20, grefs 24
=========  ======  =======================================================================

arm is x86_64's; native is whichever this machine's compiler makes.  Everything is little endian.
Segments are alike everywhere: see `xbd.core.blkif.segments`, also for what their bounds are.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from xbd.core.blkif.constants import MAX_SEGMENTS
from xbd.core.errors import BadNegotiation

RING_HEADER_BYTES: Final = 64
_RING_SLOTS_PER_PAGE: Final = 32


@attrs.frozen(kw_only=True, eq=False)
class Abi:
    """How requests and responses lie in a ring."""

    name: str
    protocol: str
    """The value of the frontend's ``protocol`` key."""
    request_size: int
    response_size: int
    id_offset: int
    sector_offset: int
    segments_offset: int
    head: struct.Struct
    """operation, nr_segments, id, sector_number; gref and bounds of the first segment."""
    segments: tuple[struct.Struct, ...]
    """By their number: gref and bounds of each; unpack them from `segments_offset`."""
    discard: struct.Struct
    """operation, flag, handle, id, sector_number, nr_sectors."""
    indirect: struct.Struct
    """operation, indirect_op, nr_segments, id, sector_number, handle, 8 grefs."""
    response: struct.Struct
    """id, operation, status; padding is zero (XSA-216)."""

    @property
    def entry_size(self) -> int:
        """Distance of two slots in the ring."""
        return self.request_size


def _make(name: str, protocol: str, *, gap: str, size: int, response: str) -> Abi:
    segments = struct.calcsize(f"<BBH{gap}QQ")
    return Abi(
        name=name,
        protocol=protocol,
        request_size=size,
        response_size=struct.calcsize(response),
        id_offset=segments - 16,
        sector_offset=segments - 8,
        segments_offset=segments,
        head=struct.Struct(f"<BB2x{gap}QQIH{size - segments - 6}x"),
        segments=tuple(struct.Struct("<" + "IHxx" * n) for n in range(MAX_SEGMENTS + 1)),
        discard=struct.Struct(f"<BBH{gap}QQQ{size - segments - 8}x"),
        indirect=struct.Struct(f"<BBH{gap}QQH2x8I{size - segments - 36}x"),
        response=struct.Struct(response),
    )


X86_64: Final = _make("x86_64", "x86_64-abi", gap="4x", size=112, response="<QBxh4x")
X86_32: Final = _make("x86_32", "x86_32-abi", gap="", size=108, response="<QBxh")
ARM: Final = _make("arm", "arm-abi", gap="4x", size=112, response="<QBxh4x")
NATIVE: Final = X86_64 if struct.calcsize("@BQ") == 16 else X86_32
ABIS: Final = {abi.protocol: abi for abi in (X86_64, X86_32, ARM)}
_X86: Final = ("x86_64", "amd64", "i386", "i486", "i586", "i686")


def pick_abi(protocol: str | None, *, machine: str) -> Abi:
    """The ABI a frontend speaks.

    A frontend that says nothing is taken for 32-bit on x86, as Linux does, and for native
    elsewhere.  Raises `BadNegotiation` for an unknown name.
    """
    if protocol is None:
        return X86_32 if machine.lower() in _X86 else NATIVE
    abi = ABIS.get(protocol)
    if abi is None:
        raise BadNegotiation(f"unknown protocol {protocol[:20]!r}; known: {', '.join(ABIS)}")
    return abi


def entries(order: int) -> int:
    """Slots in a ring of 2**order pages, the same for all ABIs."""
    return _RING_SLOTS_PER_PAGE << order
