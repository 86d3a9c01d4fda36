"""Encryption of sectors, each with an initialization vector made from its number.

Source: cryptsetup's docs/on-disk-format.pdf, section 6 (names of ciphers, modes and IVs); dm-crypt
for what ``plain``, ``plain64`` and ``essiv`` are.
"""

from __future__ import annotations

import errno
import hashlib
import re
from typing import TYPE_CHECKING, Any, Final

import attrs

from xbd.core.driver import OpenFailed
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.layout import SECTOR

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

_BLOCK: Final = 16
"""Of AES, in bytes."""
_KEY_BYTES: Final = {"xts": (32, 64), "cbc": (16, 32)}
"""Not AES-192: OpenSSL has no XTS with it, and QEMU fails on its key slots with CBC."""
_IVS: Final = ("plain", "plain64", "essiv:sha256")
_ESSIV: Final = "essiv:sha256"
_MODE_PATTERN: Final = re.compile(r"(?P<mode>[a-z0-9]+)-(?P<iv>[a-z0-9]+(?::[a-z0-9]+)?)")


@attrs.frozen(kw_only=True)
class CipherSpec:
    """Which cipher, with how long a key."""

    mode: str = "xts"
    iv: str = "plain64"
    key_bytes: int = 64
    """Of XTS, two keys in a row."""

    @property
    def cipher_mode(self) -> str:
        """As a LUKS header has it."""
        return f"{self.mode}-{self.iv}"


def parse_cipher(name: str, cipher_mode: str, key_bytes: int) -> CipherSpec:
    """From a LUKS header's words; raises `OpenFailed` for what is not supported."""
    match = _MODE_PATTERN.fullmatch(cipher_mode)
    mode, iv = match.group("mode", "iv") if match else ("", "")
    if iv.startswith(("plain:", "plain64:")):  # QEMU can write a hash here, and nobody uses it
        iv = iv.partition(":")[0]
    if name != "aes" or iv not in _IVS or key_bytes not in _KEY_BYTES.get(mode, ()):
        raise OpenFailed(
            f"its encryption {name}-{cipher_mode} with a key of {key_bytes * 8} bits is not "
            "supported: aes in the modes xts (256 or 512 bits) and cbc (128 or 256), with "
            f"{', '.join(_IVS)}, is",
            errno=errno.EOPNOTSUPP,
        )
    return CipherSpec(mode=mode, iv=iv, key_bytes=key_bytes)


def cryptography_ciphers() -> Any:
    """The module of the package cryptography; `OpenFailed` if it is not installed."""
    try:
        from cryptography.hazmat.primitives import ciphers
        from cryptography.hazmat.primitives.ciphers import algorithms, modes  # noqa: F401
    except ImportError:
        raise OpenFailed(
            "an encrypted image needs the Python package cryptography: install it with "
            "pip install 'xbd[luks]'",
            errno=errno.EOPNOTSUPP,
        ) from None
    return ciphers


class SectorCipher:
    """A key in use.  Thread-safe.

    One AES context per sector is what the package cryptography allows: 130 MB/s on a machine
    whose AES does 1 GB/s, and the GIL is held.
    """

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        """Raises `OpenFailed` without the package cryptography, `CorruptImage` for a key that no
        random generator makes."""
        ciphers = cryptography_ciphers()
        if spec.mode == "xts" and key[: len(key) // 2] == key[len(key) // 2 :]:
            raise CorruptImage("both halves of the master key are the same")
        self.spec = spec
        self._ciphers = ciphers
        self._aes = ciphers.algorithms.AES(key)
        self._mode = ciphers.modes.XTS if spec.mode == "xts" else ciphers.modes.CBC
        self._essiv: Any = None
        if spec.iv == _ESSIV:
            salt = ciphers.algorithms.AES(hashlib.sha256(key).digest())
            self._essiv = ciphers.Cipher(salt, ciphers.modes.ECB())

    def __repr__(self) -> str:
        return f"<SectorCipher aes-{self.spec.cipher_mode}, {self.spec.key_bytes * 8} bits>"

    def encrypt(self, data: bytearray | memoryview, first_sector: int) -> None:
        """In place; `data` begins with sector `first_sector`, and only the last may be short."""
        self._transform(data, first_sector, "encryptor")

    def decrypt(self, data: bytearray | memoryview, first_sector: int) -> None:
        """As `encrypt`."""
        self._transform(data, first_sector, "decryptor")

    def _transform(self, data: bytearray | memoryview, first_sector: int, direction: str) -> None:
        view = memoryview(data)
        mode = self._mode
        cipher = self._ciphers.Cipher(self._aes, mode(bytes(_BLOCK)))
        done = []
        for at, iv in zip(
            range(0, len(view), SECTOR),
            self._ivs(first_sector, -(-len(view) // SECTOR)),
            strict=True,
        ):
            cipher.mode = mode(iv)  # a third faster than a new Cipher
            context: CipherContext = getattr(cipher, direction)()
            done.append(context.update(view[at : at + SECTOR]))
        view[:] = b"".join(done)

    def _ivs(self, first: int, count: int) -> list[bytes]:
        mask = 0xFFFF_FFFF if self.spec.iv == "plain" else 0xFFFF_FFFF_FFFF_FFFF
        plain = [(first + number & mask).to_bytes(_BLOCK, "little") for number in range(count)]
        if self._essiv is None:
            return plain
        encrypted: bytes = self._essiv.encryptor().update(b"".join(plain))
        return [encrypted[at : at + _BLOCK] for at in range(0, len(encrypted), _BLOCK)]
