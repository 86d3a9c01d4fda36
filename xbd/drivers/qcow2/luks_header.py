"""The header of a LUKS1 area, as bytes and as an object.

Source: cryptsetup's docs/on-disk-format.pdf ("LUKS On-Disk Format Specification" 1.2.3), section
2, whose field names are used here.  Offsets in the header count sectors from the area's beginning.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.layout import SECTOR

MAGIC: Final = b"LUKS\xba\xbe"
VERSION: Final = 1
STRIPES: Final = 4000
"""The specification's choice for all key slots; QEMU and cryptsetup know no other."""
KEY_SLOTS: Final = 8
SALT_BYTES: Final = 32
DIGEST_BYTES: Final = 20
ALIGNMENT: Final = 4096
"""Of key material, as QEMU and cryptsetup place it."""

HASHES: Final = ("sha1", "sha224", "sha256", "sha384", "sha512")
MAX_KEY_BYTES: Final = 64
MIN_ITERATIONS: Final = 1000
MAX_ITERATIONS: Final = 50_000_000
"""A minute or so for a wrong passphrase; qemu-img and cryptsetup write some millions."""

_ENABLED: Final = 0x00AC71F3
_DISABLED: Final = 0x0000DEAD
_HEADER: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
HEADER_BYTES: Final = _HEADER.size + KEY_SLOTS * _SLOT.size


@attrs.frozen(kw_only=True)
class KeySlot:
    """Where the master key lies, split and encrypted by one passphrase."""

    active: bool
    iterations: int
    salt: bytes
    key_offset: int
    """In sectors."""


@attrs.frozen(kw_only=True)
class LuksHeader:
    """Everything but the key material."""

    cipher_name: str
    cipher_mode: str
    hash_spec: str
    payload_offset: int
    """In sectors; without meaning inside a qcow2 image."""
    key_bytes: int
    mk_digest: bytes
    mk_digest_salt: bytes
    mk_digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def split_bytes(self) -> int:
        """Length of one slot's key material."""
        return self.key_bytes * STRIPES


def parse_luks_header(data: bytes | bytearray, area_length: int) -> LuksHeader:
    """Take apart the beginning of an area of `area_length` bytes.

    Every number is checked and every slot in use lies inside the area.  Raises `CorruptImage`.
    """
    _require(len(data) >= HEADER_BYTES, "the LUKS header is cut off")
    magic, version, name, mode, hash_spec, payload, key_bytes, digest, salt, iterations, uuid = (
        _HEADER.unpack_from(data)
    )
    _require(magic == MAGIC, "there is no LUKS header where it should be")
    _require(version == VERSION, f"LUKS version {version} is not supported")
    header = LuksHeader(
        cipher_name=_text(name, "cipher's name"),
        cipher_mode=_text(mode, "cipher's mode"),
        hash_spec=_text(hash_spec, "hash's name"),
        payload_offset=payload,
        key_bytes=key_bytes,
        mk_digest=digest,
        mk_digest_salt=salt,
        mk_digest_iterations=iterations,
        uuid=uuid.rstrip(b"\0").decode("ascii", "replace"),
        slots=tuple(
            _parse_slot(data[_HEADER.size + number * _SLOT.size :]) for number in range(KEY_SLOTS)
        ),
    )
    _require(
        header.hash_spec in HASHES,
        f"the LUKS header's hash {header.hash_spec!r} is not supported ({', '.join(HASHES)} are)",
    )
    _require(0 < key_bytes <= MAX_KEY_BYTES, f"a LUKS master key of {key_bytes} bytes")
    _check_iterations(iterations)
    for slot in header.slots:
        if slot.active:
            _check_iterations(slot.iterations)
            start = slot.key_offset * SECTOR
            _require(
                start >= HEADER_BYTES and start + header.split_bytes <= area_length,
                f"a LUKS key slot's material at {start} lies outside its area",
            )
    return header


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CorruptImage(problem)


def _check_iterations(iterations: int) -> None:
    _require(
        0 < iterations <= MAX_ITERATIONS,
        f"{iterations} LUKS iterations are not supported (1 to {MAX_ITERATIONS} are)",
    )


def _parse_slot(data: bytes | bytearray) -> KeySlot:
    state, iterations, salt, key_offset, stripes = _SLOT.unpack_from(data)
    _require(state in (_ENABLED, _DISABLED), f"a LUKS key slot's state is {state:#x}")
    active = state == _ENABLED
    _require(not active or stripes == STRIPES, f"a LUKS key slot has {stripes} stripes, not 4000")
    return KeySlot(active=active, iterations=iterations, salt=salt, key_offset=key_offset)


def _text(field: bytes, what: str) -> str:
    text = field.split(b"\0", 1)[0]
    # Only then it can be shown to people.
    _require(text.isascii() and text.decode("ascii").isprintable(), f"the LUKS {what} is no text")
    return text.decode("ascii")


def pack_luks_header(header: LuksHeader) -> bytes:
    """The area's first bytes."""
    return _HEADER.pack(
        MAGIC,
        VERSION,
        header.cipher_name.encode("ascii"),
        header.cipher_mode.encode("ascii"),
        header.hash_spec.encode("ascii"),
        header.payload_offset,
        header.key_bytes,
        header.mk_digest,
        header.mk_digest_salt,
        header.mk_digest_iterations,
        header.uuid.encode("ascii"),
    ) + b"".join(
        _SLOT.pack(
            _ENABLED if slot.active else _DISABLED,
            slot.iterations,
            slot.salt,
            slot.key_offset,
            STRIPES,
        )
        for slot in header.slots
    )


def area_sectors(key_bytes: int) -> tuple[list[int], int]:
    """Where the slots' key material begins, and where the area ends, as QEMU lays it out."""
    step = -(-key_bytes * STRIPES // ALIGNMENT) * ALIGNMENT // SECTOR
    first = ALIGNMENT // SECTOR
    starts = [first + number * step for number in range(KEY_SLOTS)]
    return starts, first + KEY_SLOTS * step
