"""The options of ``qcow2:``."""

from __future__ import annotations

from pathlib import Path

import attrs

from xbd.core.driver import absolute_path, boolean, choice, option, size, text
from xbd.core.hostio.hostfile import CACHE_NONE, CACHE_WRITEBACK
from xbd.drivers.qcow2.image import DEFAULT_CACHE_BYTES


@attrs.frozen(kw_only=True)
class Qcow2Options:
    """What can be said about a qcow2 image."""

    path: Path = option(absolute_path, help="the image; it must exist (see: xbd image create)")
    cache: str | None = option(
        choice(CACHE_NONE, CACHE_WRITEBACK),
        default=None,
        help="of guest data; none: past the host's page cache (O_DIRECT); writeback: through it; "
        "not given: none where the filesystem and the clusters' size allow it.  In each case what "
        "the guest has flushed is on the disk.",
    )
    discard: str = option(
        choice("unmap", "ignore"),
        default="unmap",
        help="unmap: what the guest discards is freed in the image and becomes a hole in its file; "
        "ignore: the guest is offered no discard",
    )
    locking: bool = option(
        boolean,
        default=True,
        help="lock the image, so that nobody (xbd, QEMU) writes to it at the same time",
    )
    backing_format: str | None = option(
        choice("raw", "qcow2"),
        default=None,
        help="format of the backing file, where the image's header does not say it",
    )
    data_file: Path | None = option(
        absolute_path,
        default=None,
        help="the external data file, instead of the one that the header names",
    )
    key_file: Path | None = option(
        absolute_path, default=None, help="file with the passphrase of an encrypted image"
    )
    key_credential: str | None = option(
        text, default=None, help="systemd credential with the passphrase of an encrypted image"
    )
    l2_cache_size: int = option(
        size,
        default=DEFAULT_CACHE_BYTES,
        help="bytes of L2 tables kept in memory; 8 MiB cover 64 GiB of clusters of 64 KiB",
    )
    compress: bool = option(
        boolean,
        default=False,
        help="store writes of whole clusters compressed, for filling a new image",
    )
