"""Replacing a header that is longer than a sector, as when the backing file gets another name.

Source: QEMU's docs/interop/qcow2.rst, "Header" and "Header extensions".

A power cut can tear a write apart between sectors.  So a header is only ever replaced by the one
write of its first sector, and all else that the new one needs is durable in places that the old one
does not use.  For that it is a short header for a while, without the names of features, which
nobody needs, and with the backing file's name far behind.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from xbd.drivers.qcow2.header import Header, pack_header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import SECTOR, ExtensionType

_BACKING: Final = struct.Struct(">QI")
_BACKING_AT: Final = 8


def replace_header(host: Host, header: Header) -> None:
    """Write a header and make it durable: after a crash it is the old one or the new one.

    Where clusters are too small for two names, or the header has extensions that fill a sector, a
    power cut (but no other crash) can tear it.  Raises `CorruptImage` if it does not fit.
    """
    new = pack_header(header)
    old = bytes(host.read(0, header.cluster_size)).rstrip(b"\0")
    whole = new.ljust(max(len(old), SECTOR), b"\0")
    if whole[SECTOR:].rstrip(b"\0") != old[SECTOR:]:
        far = -(-max(len(old), len(new)) // SECTOR) * SECTOR
        short = _short(header, far)
        name = (header.backing_file or "").encode("utf-8", "surrogateescape")
        if len(short) <= SECTOR and far + len(name) <= header.cluster_size:
            _write(host, far, name)
            _write(host, 0, short.ljust(SECTOR, b"\0"))
            _write(host, SECTOR, whole[SECTOR:])
            _write(host, 0, whole[:SECTOR])
            _write(host, far, bytes(len(name)))
            return
    _write(host, 0, whole)


def _short(header: Header, name_at: int) -> bytes:
    """What fits into a sector, the backing file's name being elsewhere."""
    short = header.with_extension(ExtensionType.FEATURE_NAMES, None)
    packed = bytearray(pack_header(attrs.evolve(short, backing_file=None)))
    if header.backing_file is not None:
        length = len(header.backing_file.encode("utf-8", "surrogateescape"))
        _BACKING.pack_into(packed, _BACKING_AT, name_at, length)
    return bytes(packed)


def _write(host: Host, offset: int, data: bytes) -> None:
    if data:
        host.write(offset, data)
        host.flush()
