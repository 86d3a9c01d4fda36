"""What an image says of itself, under the names that ``qemu-img info --output=json`` has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from xbd.core.driver import ImageInfo, OpenFailed
from xbd.core.hostio.failures import shown
from xbd.drivers.qcow2.bitmaps import Bitmap, BitmapFlag, load_bitmaps
from xbd.drivers.qcow2.confined import named_path
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import SECTOR, Compatible, CryptMethod, Incompatible
from xbd.drivers.qcow2.luks import crypto_area
from xbd.drivers.qcow2.luks_header import HEADER_BYTES, STRIPES, KeySlot, parse_luks_header
from xbd.drivers.qcow2.offline import opened_file, read_header
from xbd.drivers.qcow2.snapshot_table import read_snapshots

_COMPAT: Final = {2: "0.10", 3: "1.1"}


def read_info(path: Path, *, share: bool = False) -> ImageInfo:
    """See `ImageFormat.info`.  Opens nothing but the image's own file."""
    with opened_file(path, writable=False, share=share) as host:
        header = read_header(host)
        try:
            return _info(host, header)
        except CorruptImage as error:
            raise CorruptImage(f"{shown(path)}: {error}") from error


def _info(host: Host, header: Header) -> ImageInfo:
    return ImageInfo(
        path=host.path,
        format="qcow2",
        virtual_size=header.size,
        actual_size=os.fstat(host.fd).st_blocks * 512,
        cluster_size=header.cluster_size,
        encrypted=header.crypt_method is not CryptMethod.NONE,
        dirty=bool(header.incompatible & Incompatible.DIRTY),
        corrupt=bool(header.incompatible & Incompatible.CORRUPT),
        backing_file=header.backing_file,
        backing_format=header.backing_format if header.backing_file is not None else None,
        backing_path=_backing_path(host.path, header),
        data_file=header.data_file if header.has_data_file else None,
        snapshots=tuple(
            snapshot.info(header.size) for snapshot in read_snapshots(host, header).snapshots
        ),
        details=_details(host, header),
    )


def _backing_path(path: Path, header: Header) -> Path | None:
    if header.backing_file is None:
        return None
    try:
        return named_path(header.backing_file, path.parent, "the backing file")
    except OpenFailed:
        return None


def _details(host: Host, header: Header) -> dict[str, Any]:
    details: dict[str, Any] = {
        "compat": _COMPAT[header.version],
        "compression-type": header.compression_type.name.lower(),
    }
    if header.version >= 3:
        details["lazy-refcounts"] = bool(header.compatible & Compatible.LAZY_REFCOUNTS)
    details["refcount-bits"] = header.refcount_bits
    bitmaps = load_bitmaps(host, header)
    if bitmaps:
        details["bitmaps"] = [_bitmap(bitmap) for bitmap in bitmaps]
    if header.has_data_file:
        details["data-file"] = header.data_file
    if header.crypt_method is CryptMethod.AES:
        details["encrypt"] = {"format": "aes"}
    elif header.crypt_method is CryptMethod.LUKS:
        details["encrypt"] = _luks(host, header)
    if header.version >= 3:
        if header.has_data_file:
            details["data-file-raw"] = header.raw_data_file
        details["corrupt"] = bool(header.incompatible & Incompatible.CORRUPT)
        details["extended-l2"] = header.extended_l2
    return details


def _bitmap(bitmap: Bitmap) -> dict[str, Any]:
    names = {BitmapFlag.IN_USE: "in-use", BitmapFlag.AUTO: "auto"}
    return {
        "flags": [name for flag, name in names.items() if bitmap.flags & flag],
        "name": bitmap.name,
        "granularity": bitmap.granularity,
    }


def _luks(host: Host, header: Header) -> dict[str, Any]:
    offset, length = crypto_area(header)
    luks = parse_luks_header(host.read(offset, HEADER_BYTES), length)
    mode, _, iv = luks.cipher_mode.partition("-")
    algorithm, _, iv_hash = iv.partition(":")
    keys = 2 if mode == "xts" else 1
    told = {
        "ivgen-alg": algorithm,
        "hash-alg": luks.hash_spec,
        "cipher-alg": f"{luks.cipher_name}-{luks.key_bytes * 8 // keys}",
        "uuid": luks.uuid,
        "format": "luks",
        "cipher-mode": mode,
        "slots": [_slot(slot) for slot in luks.slots],
        "payload-offset": luks.payload_offset * SECTOR,
        "master-key-iters": luks.mk_digest_iterations,
    }
    return told | ({"ivgen-hash-alg": iv_hash} if iv_hash else {})


def _slot(slot: KeySlot) -> dict[str, Any]:
    told: dict[str, Any] = {"active": slot.active, "key-offset": slot.key_offset * SECTOR}
    if slot.active:
        told |= {"iters": slot.iterations, "stripes": STRIPES}
    return told
