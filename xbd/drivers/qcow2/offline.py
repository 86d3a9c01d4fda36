"""Opening an image's file for a command."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xbd.core.driver import OpenFailed
from xbd.core.hostio.failures import shown
from xbd.core.hostio.files import kind_of, stat_path
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header, parse_header
from xbd.drivers.qcow2.host import Host, open_host


@contextmanager
def opened_file(path: Path, *, writable: bool, share: bool = False) -> Iterator[Host]:
    """A regular file or a block device, locked unless `share`.  Raises `OpenFailed`."""
    require_image_file(path)
    host = open_host(path, writable=writable, lock=not share)
    try:
        yield host
    finally:
        host.close()


def require_image_file(path: Path) -> None:
    """Raise `OpenFailed` if it is anything else, opening which can wait for ever."""
    status = stat_path(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise OpenFailed(f"{shown(path)} is a {kind_of(status)}, not an image file")


def read_header(host: Host) -> Header:
    """Raises `CorruptImage`, naming the file."""
    first = bytes(host.read(0, min(host.size(), 1 << layout.MAX_CLUSTER_BITS)))
    try:
        return parse_header(first)
    except CorruptImage as error:
        raise CorruptImage(f"{shown(host.path)}: {error}") from error
