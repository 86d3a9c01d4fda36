"""What a backend tells its frontend: geometry and features, all of it before state 2.

Frontends read these keys at different times, some before state 2, so they appear in one
transaction.  Sizes are in sectors of 512 bytes whatever sector-size says (blkif.h since Xen 4.20).
"""

from __future__ import annotations

from typing import Final

from xbd.core.backend.keys import OwnKeys
from xbd.core.backend.policy import FeatureToggles
from xbd.core.blkif import constants
from xbd.core.datapath.config import Features, GrantMode
from xbd.core.driver import Capability, Geometry

_PERSISTENT_MODES: Final = (GrantMode.AUTO, GrantMode.PERSISTENT)


def choose_features(
    wanted: FeatureToggles, grants: GrantMode, capabilities: Capability, own: OwnKeys
) -> Features:
    """What this disk can do, less what the configuration or the toolstack switched off.

    A disk without FLUSH makes every write durable by itself, so there is nothing to offer.
    """
    flushes = Capability.FLUSH in capabilities
    return Features(
        flush=wanted.flush and flushes,
        barrier=wanted.barrier and flushes,
        discard=wanted.discard
        and own.writable
        and own.discard_enable
        and Capability.DISCARD in capabilities,
        discard_secure=False,
        persistent=wanted.persistent and grants in _PERSISTENT_MODES,
        max_indirect_segments=wanted.max_indirect_segments,
        max_ring_order=wanted.max_ring_page_order,
        max_queues=wanted.max_queues,
    )


def info_flags(own: OwnKeys, *, read_only: bool) -> int:
    """The VDISK_* flags of the key ``info``."""
    flags = 0
    if own.device_type == "cdrom":
        flags |= constants.VDISK_CDROM
    if own.removable:
        flags |= constants.VDISK_REMOVABLE
    if read_only:
        flags |= constants.VDISK_READONLY
    return flags


def size_keys(geometry: Geometry) -> dict[str, int]:
    """The keys that a resize changes."""
    return {"sectors": geometry.size // constants.SECTOR}


def offer(
    geometry: Geometry, features: Features, own: OwnKeys, *, read_only: bool
) -> dict[str, int]:
    """Every key, by name."""
    keys = {
        **size_keys(geometry),
        "sector-size": geometry.logical_block,
        "physical-sector-size": max(geometry.physical_block, geometry.logical_block),
        "info": info_flags(own, read_only=read_only),
        "feature-flush-cache": int(features.flush),
        "feature-barrier": int(features.barrier),
        "feature-discard": int(features.discard),
        "feature-persistent": int(features.persistent),
        "feature-max-indirect-segments": features.max_indirect_segments,
        "max-ring-page-order": features.max_ring_order,
        "max-ring-pages": 1 << features.max_ring_order,
        "multi-queue-max-queues": features.max_queues,
    }
    if features.discard:
        keys["discard-granularity"] = geometry.discard_granularity or geometry.logical_block
        keys["discard-alignment"] = geometry.discard_alignment
        keys["discard-secure"] = int(features.discard_secure)
    return keys
