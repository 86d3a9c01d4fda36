"""Encrypted images: crypt method 2, a LUKS1 area inside the image.

Source: QEMU's docs/interop/qcow2.rst, "Full disk encryption header pointer" and "Data encryption";
cryptsetup's docs/on-disk-format.pdf, section 4.  Sectors are numbered from the beginning of the
host file.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import struct
import time
import uuid
from collections.abc import Callable
from typing import Final

import attrs

from xbd.core.driver import OpenFailed
from xbd.core.units import MIB
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.layout import SECTOR, CryptMethod, ExtensionType
from xbd.drivers.qcow2.luks_cipher import CipherSpec, SectorCipher, parse_cipher
from xbd.drivers.qcow2.luks_header import (
    DIGEST_BYTES,
    HEADER_BYTES,
    KEY_SLOTS,
    MAX_ITERATIONS,
    MIN_ITERATIONS,
    SALT_BYTES,
    STRIPES,
    KeySlot,
    LuksHeader,
    area_sectors,
    pack_luks_header,
    parse_luks_header,
)
from xbd.drivers.qcow2.luks_split import merge, split

Read = Callable[[int, int], bytes | bytearray]
"""``read(offset, length)``: exactly so many bytes."""

_POINTER: Final = struct.Struct(">QQ")
_MAX_AREA: Final = 16 * MIB

UNLOCK_SECONDS: Final = 1.5
"""What a new image's passphrase costs to try, on the machine that makes it."""
_DIGEST_SHARE: Final = 8
"""The digest of the master key costs an eighth of that, as with cryptsetup."""
_TRIAL_SECONDS: Final = 0.05


def open_encryption(header: Header, read: Read, secret: bytes | None) -> SectorCipher | None:
    """The cipher of an image's data; None: it is not encrypted.

    `read` reads the image's file.  Raises `OpenFailed` without a secret, for a wrong one (EACCES)
    and for an encryption that is not supported, `CorruptImage` for broken headers.
    """
    if header.crypt_method is CryptMethod.NONE:
        return None
    if header.crypt_method is CryptMethod.AES:
        raise OpenFailed(
            "its encryption is qcow2's old one, which is not safe: convert it to LUKS with "
            "qemu-img convert",
            errno=errno.EOPNOTSUPP,
        )
    if secret is None:
        raise OpenFailed(
            "it is encrypted: say where its passphrase is, by key-file=/PATH or "
            "key-credential=NAME",
            errno=errno.EACCES,
        )
    start, length = crypto_area(header)
    return open_luks(lambda offset, size: read(start + offset, size), length, secret)


def crypto_area(header: Header) -> tuple[int, int]:
    """Where the LUKS area of an encrypted image lies: offset and length in bytes."""
    data = header.extension(ExtensionType.ENCRYPTION)
    if data is None or len(data) != _POINTER.size:
        raise CorruptImage("it is encrypted, and says nowhere how")
    offset, length = _POINTER.unpack(data)
    if offset == 0 or offset % header.cluster_size or offset + length >= 1 << 56:
        raise CorruptImage(f"the LUKS area can't be at {offset}")
    if not HEADER_BYTES <= length <= _MAX_AREA:
        raise CorruptImage(f"a LUKS area of {length} bytes is impossible")
    return offset, length


def pack_crypto_area(offset: int, length: int) -> bytes:
    """The header extension that names a LUKS area."""
    return _POINTER.pack(offset, length)


def open_luks(read: Read, length: int, secret: bytes) -> SectorCipher:
    """Find the key slot that the secret opens, in a LUKS area of `length` bytes.

    `read` reads the area.  Takes about a second for each slot in use.
    """
    header = parse_luks_header(read(0, HEADER_BYTES), length)
    spec = parse_cipher(header.cipher_name, header.cipher_mode, header.key_bytes)
    slots = [slot for slot in header.slots if slot.active]
    if not slots:
        raise CorruptImage("none of the LUKS key slots is in use: nobody can ever open it again")
    for slot in slots:
        material = bytearray(read(slot.key_offset * SECTOR, header.split_bytes))
        key = _master_key(header, spec, slot, material, secret)
        if key is not None:
            return SectorCipher(spec, key)
    newline = " (its last byte is a newline, which counts)" if secret.endswith(b"\n") else ""
    raise OpenFailed(f"the passphrase{newline} is wrong: it opens no key slot", errno=errno.EACCES)


def _master_key(
    header: LuksHeader, spec: CipherSpec, slot: KeySlot, material: bytearray, secret: bytes
) -> bytes | None:
    """What the secret makes of a slot's material; None: not the master key."""
    slot_key = _pbkdf2(header.hash_spec, secret, slot.salt, slot.iterations, header.key_bytes)
    SectorCipher(spec, slot_key).decrypt(material, 0)
    key = merge(material, STRIPES, header.hash_spec)
    return key if hmac.compare_digest(_digest(header, key), header.mk_digest) else None


def _digest(header: LuksHeader, key: bytes) -> bytes:
    iterations = header.mk_digest_iterations
    return _pbkdf2(header.hash_spec, key, header.mk_digest_salt, iterations, DIGEST_BYTES)


def _pbkdf2(hash_spec: str, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    return hashlib.pbkdf2_hmac(hash_spec, secret, salt, iterations, length)


@attrs.frozen(kw_only=True)
class NewLuks:
    """A LUKS area to be written."""

    start: bytes = attrs.field(repr=False)
    """Its first bytes; the rest are zeroes."""
    length: int
    cipher: SectorCipher


def create_luks(
    secret: bytes,
    *,
    spec: CipherSpec | None = None,
    hash_spec: str = "sha256",
    iterations: int | None = None,
) -> NewLuks:
    """A new master key, in the first slot of a new area.

    `iterations`: None: as many as take `UNLOCK_SECONDS` here; that is how long this call takes.
    """
    spec = CipherSpec() if spec is None else spec
    if iterations is None:
        rate = _iterations_per_second(hash_spec, spec.key_bytes)
        iterations = min(MAX_ITERATIONS, int(rate * UNLOCK_SECONDS))
    key = os.urandom(spec.key_bytes)
    starts, end = area_sectors(spec.key_bytes)
    header = LuksHeader(
        cipher_name="aes",
        cipher_mode=spec.cipher_mode,
        hash_spec=hash_spec,
        payload_offset=end,
        key_bytes=spec.key_bytes,
        mk_digest=b"",
        mk_digest_salt=os.urandom(SALT_BYTES),
        mk_digest_iterations=max(MIN_ITERATIONS, iterations // _DIGEST_SHARE),
        uuid=str(uuid.uuid4()),
        slots=tuple(
            KeySlot(
                active=number == 0,
                iterations=max(MIN_ITERATIONS, iterations) if number == 0 else 0,
                salt=os.urandom(SALT_BYTES) if number == 0 else bytes(SALT_BYTES),
                key_offset=starts[number],
            )
            for number in range(KEY_SLOTS)
        ),
    )
    header = attrs.evolve(header, mk_digest=_digest(header, key))
    material = _locked(header, spec, key, secret)
    packed = pack_luks_header(header).ljust(starts[0] * SECTOR, b"\0")
    return NewLuks(
        start=packed + bytes(material), length=end * SECTOR, cipher=SectorCipher(spec, key)
    )


def _locked(header: LuksHeader, spec: CipherSpec, key: bytes, secret: bytes) -> bytearray:
    """The first slot's key material."""
    slot = header.slots[0]
    slot_key = _pbkdf2(header.hash_spec, secret, slot.salt, slot.iterations, header.key_bytes)
    material = bytearray(split(key, STRIPES, header.hash_spec))
    SectorCipher(spec, slot_key).encrypt(material, 0)
    return material


def _iterations_per_second(hash_spec: str, length: int) -> float:
    """Of PBKDF2 in this thread, whatever else the machine does."""
    iterations = MIN_ITERATIONS
    while True:
        before = time.thread_time()
        _pbkdf2(hash_spec, b"secret", bytes(SALT_BYTES), iterations, length)
        spent = time.thread_time() - before
        if spent >= _TRIAL_SECONDS:
            return iterations / spent
        iterations *= 2
