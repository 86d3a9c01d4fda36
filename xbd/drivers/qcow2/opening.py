"""Opening a qcow2 image: its header, what it needs, and what has to be put right first."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import attrs

from xbd.core.driver import DriverError, OpenFailed
from xbd.core.hostio.failures import shown
from xbd.drivers.qcow2.chain import open_backing, open_data_file
from xbd.drivers.qcow2.header import Header, pack_header
from xbd.drivers.qcow2.host import PAGE, Host, open_host
from xbd.drivers.qcow2.image import DEFAULT_CACHE_BYTES, Backing, Cipher, Image
from xbd.drivers.qcow2.layout import Autoclear, CryptMethod, Incompatible
from xbd.drivers.qcow2.offline import read_header, require_image_file

_KNOWN_AUTOCLEAR: Final = sum(Autoclear)


@attrs.frozen(kw_only=True)
class Wishes:
    """How an image is to be opened."""

    writable: bool = False
    direct: bool = False
    """Data past the page cache, if the host and the clusters' size allow it."""
    lock: bool = True
    image_dirs: Sequence[Path] | None = None
    """Where what an image names may lie; None: anywhere."""
    backing_format: str | None = None
    data_file: Path | None = None
    key: bytes | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    with_backing: bool = True
    """False: what lies behind the image reads as zeroes."""
    with_data: bool = True
    """False: only metadata are of interest; an encrypted image needs no key."""


def open_image(path: Path, wishes: Wishes) -> Image:
    """Open, lock and understand an image.  Raises `OpenFailed`; nothing stays open then."""
    require_image_file(path)
    host = open_host(path, writable=wishes.writable, direct=wishes.direct, lock=wishes.lock)
    try:
        header = read_header(host)
        if host.direct and header.cluster_size < PAGE:
            # Data and metadata would share pages, and direct I/O with them.
            host.close()
            host = open_host(path, writable=wishes.writable, lock=wishes.lock)
            header = read_header(host)
        return make_image(host, header, wishes)
    except OpenFailed:
        host.close()
        raise
    except DriverError as error:
        host.close()
        name, told = shown(path), str(error)
        if not told.startswith(name):
            told = f"{name}: {told}"
        raise OpenFailed(f"cannot open {told}", errno=error.errno) from error
    except BaseException:
        host.close()
        raise


def make_image(host: Host, header: Header, wishes: Wishes) -> Image:
    """An image from its open file; raises `DriverError`, and then `host` is still open."""
    if wishes.writable:
        header = _make_writable(host, header)
    backing = None
    if wishes.with_backing:
        backing = open_backing(
            host,
            header,
            partial(_image, attrs.evolve(wishes, writable=False, data_file=None)),
            image_dirs=wishes.image_dirs,
            backing_format=wishes.backing_format,
            direct=host.direct,
            lock=wishes.lock,
        )
    try:
        return _image(wishes, host, header, backing)
    except BaseException:
        if backing is not None:
            backing.close()
        raise


def _image(wishes: Wishes, host: Host, header: Header, backing: Backing | None) -> Image:
    """Owns `host` and `backing` from now on; they stay open if it raises."""
    data_host = None
    try:
        cipher = _cipher(host, header, wishes)
        if header.has_data_file:
            data_host = open_data_file(
                host,
                header,
                image_dirs=wishes.image_dirs,
                override=wishes.data_file,
                writable=wishes.writable,
                direct=wishes.direct,
                lock=wishes.lock,
            )
        return Image(
            host,
            header,
            writable=wishes.writable,
            data_host=data_host,
            backing=backing,
            cipher=cipher,
            cache_bytes=wishes.cache_bytes,
        )
    except BaseException:
        if data_host is not None:
            data_host.close()
        raise


def _make_writable(host: Host, header: Header) -> Header:
    """What has to be put right before the first write; the header after it."""
    if header.incompatible & Incompatible.CORRUPT:
        raise OpenFailed(
            f"{shown(host.path)} is marked as corrupt: mend it with: xbd image check --repair all "
            f"qcow2:{shown(host.path)}, or open it read-only",
            errno=errno.EIO,
        )
    if header.incompatible & Incompatible.DIRTY:
        from xbd.drivers.qcow2.repair import repair_dirty

        repair_dirty(host)
        header = read_header(host)
    if header.autoclear & Autoclear.BITMAPS:
        from xbd.drivers.qcow2.bitmaps import mark_in_use

        mark_in_use(host, header)
    if header.autoclear & ~_KNOWN_AUTOCLEAR:
        # What somebody else keeps beside the data will not be true any more.
        header = attrs.evolve(header, autoclear=header.autoclear & _KNOWN_AUTOCLEAR)
        host.write(0, pack_header(header))
        host.flush()
    return header


def _cipher(host: Host, header: Header, wishes: Wishes) -> Cipher | None:
    if header.crypt_method is CryptMethod.NONE or not wishes.with_data:
        return None
    # Not at the top: an optional package is behind it.
    from xbd.drivers.qcow2.luks import open_encryption

    return open_encryption(header, host.read, wishes.key)
