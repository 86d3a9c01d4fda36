"""The options of ``raw:``."""

from __future__ import annotations

from pathlib import Path

import attrs

from xbd.core.driver import absolute_path, boolean, choice, option
from xbd.core.hostio.hostfile import CACHE_NONE, CACHE_WRITEBACK


@attrs.frozen(kw_only=True)
class RawOptions:
    """What can be said about a block device."""

    path: Path = option(absolute_path, help="the block device, for example /dev/vg0/guest1")
    cache: str = option(
        choice(CACHE_NONE, CACHE_WRITEBACK),
        default=CACHE_NONE,
        help="none: past the host's page cache (O_DIRECT); writeback: through it.  In both cases "
        "what the guest has flushed is on the device.",
    )
    discard: str = option(
        choice("unmap", "ignore"),
        default="unmap",
        help="unmap: what the guest discards is discarded on the device, where it can; ignore: "
        "the guest is offered no discard",
    )
    locking: bool = option(
        boolean,
        default=True,
        help="refuse a device that is mounted, part of a volume, or used by another guest, and "
        "keep others out; no: for guests that share a disk on purpose",
    )
    sector_size: str | None = option(
        choice("512", "4096"),
        default=None,
        help="bytes per sector that the guest sees; not given: as the device has it.  512 on a "
        "device of 4096 works, but writes of less than 4096 bytes are slow.",
    )
