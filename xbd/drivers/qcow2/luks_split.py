"""The anti-forensic splitter: a key blown up so that losing any of it loses the key.

Source: cryptsetup's docs/on-disk-format.pdf, section 2.4 ("AFsplit", "AFmerge").
"""

from __future__ import annotations

import hashlib
import os


def split(key: bytes, stripes: int, hash_spec: str) -> bytes:
    """`stripes` times as many bytes as the key has, different ones each time."""
    material = os.urandom(len(key) * (stripes - 1))
    return material + _xor(_diffused_sum(material, len(key), hash_spec), key)


def merge(material: bytes | bytearray | memoryview, stripes: int, hash_spec: str) -> bytes:
    """The key that was split."""
    length = len(material) // stripes
    whole = bytes(material)
    return _xor(_diffused_sum(whole[:-length], length, hash_spec), whole[-length:])


def _diffused_sum(material: bytes, length: int, hash_spec: str) -> bytes:
    block = bytes(length)
    for at in range(0, len(material), length):
        block = _diffuse(_xor(block, material[at : at + length]), hash_spec)
    return block


def _diffuse(block: bytes, hash_spec: str) -> bytes:
    """Each piece of a digest's length replaced by the digest of its number and itself."""
    size = hashlib.new(hash_spec, usedforsecurity=False).digest_size
    return b"".join(
        hashlib.new(
            hash_spec, number.to_bytes(4, "big") + block[at : at + size], usedforsecurity=False
        ).digest()[: len(block) - at]
        for number, at in enumerate(range(0, len(block), size))
    )


def _xor(one: bytes, other: bytes) -> bytes:
    number = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return number.to_bytes(len(one), "big")
