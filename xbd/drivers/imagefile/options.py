"""The options of ``imagefile:``."""

from __future__ import annotations

from pathlib import Path

import attrs

from xbd.core.driver import absolute_path, boolean, choice, option
from xbd.core.hostio.hostfile import CACHE_NONE, CACHE_WRITEBACK


@attrs.frozen(kw_only=True)
class ImagefileOptions:
    """What can be said about an image file."""

    path: Path = option(absolute_path, help="the image; it must exist")
    cache: str | None = option(
        choice(CACHE_NONE, CACHE_WRITEBACK),
        default=None,
        help="none: past the host's page cache (O_DIRECT); writeback: through it; not given: none "
        "where the filesystem can, otherwise writeback with a warning.  In each case what the "
        "guest has flushed is on the disk.",
    )
    discard: str = option(
        choice("unmap", "ignore"),
        default="unmap",
        help="unmap: what the guest discards becomes a hole in the file; ignore: the guest is "
        "offered no discard and the file's space stays allocated",
    )
    locking: bool = option(
        boolean,
        default=True,
        help="lock the image, so that nobody (xbd, QEMU) writes to it at the same time; no: for "
        "filesystems without locks and for guests that share a disk on purpose",
    )
    sector_size: str = option(
        choice("512", "4096"), default="512", help="bytes per sector that the guest sees"
    )
