"""LUKS in qcow2 images: QEMU opens what we made, and we open what QEMU made."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcow2_walk import Walk, tool

from xbd.core.driver import DriverError, OpenFailed
from xbd.drivers.qcow2 import luks
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.layout import SECTOR, CryptMethod, ExtensionType
from xbd.drivers.qcow2.luks import create_luks, crypto_area, open_encryption, open_luks
from xbd.drivers.qcow2.luks_cipher import CipherSpec, SectorCipher, parse_cipher
from xbd.drivers.qcow2.luks_header import (
    HEADER_BYTES,
    MAX_ITERATIONS,
    area_sectors,
    pack_luks_header,
    parse_luks_header,
)
from xbd.drivers.qcow2.luks_split import merge, split
from xbd.drivers.qcow2.secrets import MAX_SECRET_BYTES, read_secret

pytest.importorskip("cryptography")

SECRET = b"correct horse"
CLUSTER = 65536
SIZE = 1 << 20
SPECS = [
    CipherSpec(mode=mode, iv=iv, key_bytes=key_bytes)
    for mode, sizes in (("xts", (32, 64)), ("cbc", (16, 32)))
    for key_bytes in sizes
    for iv in ("plain", "plain64", "essiv:sha256")
]


def qemu_create(path: Path, **options: str) -> Path:
    """An encrypted image; QEMU measures its processor for more than a second first."""
    told = {"format": "luks", "key-secret": "s", "iter-time": "10", **options}
    settings = ",".join(f"encrypt.{name}={value}" for name, value in told.items())
    secret = f"secret,id=s,data={SECRET.decode()}"
    command = ("qemu-img", "create", "-q", "-f", "qcow2", "--object", secret, "-o", settings)
    for _ in range(20):
        try:
            tool(*command, path, str(SIZE))
        except AssertionError as error:  # its measuring is not made for busy machines
            if "Unable to get accurate CPU usage" not in str(error):
                raise
            path.unlink(missing_ok=True)
        else:
            return path
    raise AssertionError("QEMU cannot measure this machine")


def qemu_io(path: Path, *commands: str, secret: bytes = SECRET) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    tool(
        "qemu-io", "--object", f"secret,id=s,data={secret.decode()}", "--image-opts",
        f"driver=qcow2,file.filename={path},encrypt.key-secret=s", *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def default_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As QEMU encrypts when told nothing more."""
    return qemu_create(tmp_path_factory.mktemp("luks") / "default.qcow2")


def opened(walk: Walk, secret: bytes = SECRET) -> SectorCipher:
    cipher = open_encryption(walk.header, walk.read, secret)
    assert cipher is not None
    return cipher


def plaintext(walk: Walk, cipher: SectorCipher, guest: int) -> bytes:
    host = walk.host_offset(guest)
    data = bytearray(walk.read(host, CLUSTER))
    cipher.decrypt(data, host // SECTOR)
    return bytes(data)


def check_both_ways(path: Path, secret: bytes = SECRET) -> None:
    """QEMU writes and we read, then we write and QEMU reads."""
    qemu_io(path, f"write -P 0x5a 0 {CLUSTER}", f"write -P 0xa5 {CLUSTER} {CLUSTER}", secret=secret)
    walk = Walk.open(path)
    cipher = opened(walk, secret)
    assert plaintext(walk, cipher, 0) == b"\x5a" * CLUSTER
    assert plaintext(walk, cipher, CLUSTER) == b"\xa5" * CLUSTER
    host = walk.host_offset(CLUSTER)
    ours = bytearray(b"\x33" * CLUSTER)
    cipher.encrypt(memoryview(ours), host // SECTOR)
    walk.write(host, ours)
    qemu_io(path, f"read -P 0x5a 0 {CLUSTER}", f"read -P 0x33 {CLUSTER} {CLUSTER}", secret=secret)


# -- QEMU ---------------------------------------------------------------------------------------


def test_qemus_default(default_image: Path, tmp_path: Path) -> None:
    shutil.copy(default_image, tmp_path / "image")
    check_both_ways(tmp_path / "image")


def test_qemus_other_ciphers(tmp_path: Path) -> None:
    options = {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv"}
    check_both_ways(qemu_create(tmp_path / "image", **options, **{"hash-alg": "sha1"}))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.cipher_mode}-{spec.key_bytes}")
def test_qemu_opens_what_we_made(default_image: Path, tmp_path: Path, spec: CipherSpec) -> None:
    path = tmp_path / "image"
    shutil.copy(default_image, path)
    hash_spec = ("sha1", "sha256", "sha512")[SPECS.index(spec) % 3]
    made = create_luks("ünïcode".encode(), spec=spec, hash_spec=hash_spec, iterations=1000)
    walk = Walk.open(path)
    offset, length = crypto_area(walk.header)
    assert len(made.start) <= made.length <= length
    walk.write(offset, made.start.ljust(length, b"\0"))
    check_both_ways(path, "ünïcode".encode())


# -- passphrases --------------------------------------------------------------------------------


@attrs.frozen
class Area:
    """A LUKS area in memory."""

    data: bytearray

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.data)
        return bytes(self.data[offset : offset + length])

    def open(self, secret: bytes = SECRET) -> SectorCipher:
        return open_luks(self.read, len(self.data), secret)


@pytest.fixture(scope="module")
def made() -> bytes:
    new = create_luks(SECRET, iterations=1000)
    return new.start.ljust(new.length, b"\0")


@pytest.fixture
def area(made: bytes) -> Area:
    return Area(bytearray(made))


def test_a_wrong_passphrase_is_one_clear_line(area: Area) -> None:
    for wrong in (b"incorrect horse", SECRET[:-1], SECRET + b"\n"):
        with pytest.raises(OpenFailed, match=r"passphrase.* is wrong") as caught:
            area.open(wrong)
        assert caught.value.errno == 13
        assert "\n" not in str(caught.value)
        assert ("newline" in str(caught.value)) is wrong.endswith(b"\n")


def test_any_slot_in_use_opens_it(area: Area) -> None:
    header = parse_luks_header(area.data, len(area.data))
    first, fifth = header.slots[0], header.slots[5]
    moved = attrs.evolve(first, key_offset=fifth.key_offset)
    other = attrs.evolve(first, salt=bytes(32))
    slots = (other, *header.slots[1:5], moved, *header.slots[6:])
    material = area.read(first.key_offset * SECTOR, header.split_bytes)
    at = fifth.key_offset * SECTOR
    area.data[at : at + len(material)] = material
    cipher = area.open()
    area.data[:HEADER_BYTES] = pack_luks_header(attrs.evolve(header, slots=slots))
    data = bytearray(range(256)) * 4
    cipher.encrypt(data, 77)
    area.open().decrypt(data, 77)
    assert data == bytearray(range(256)) * 4
    none = attrs.evolve(header, slots=header.slots[1:] + header.slots[1:2])
    area.data[:HEADER_BYTES] = pack_luks_header(none)
    with pytest.raises(CorruptImage, match="none of the LUKS key slots"):
        area.open()


def test_two_areas_share_nothing(made: bytes) -> None:
    other = create_luks(SECRET, iterations=1000)
    assert other.start[HEADER_BYTES:] != made[HEADER_BYTES : len(other.start)]
    ours, theirs = bytearray(512), bytearray(512)
    other.cipher.encrypt(ours, 0)
    Area(bytearray(made)).open().encrypt(theirs, 0)
    assert ours != theirs


def test_iterations_are_measured_if_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "UNLOCK_SECONDS", 0.02)
    monkeypatch.setattr(luks, "_TRIAL_SECONDS", 0.005)
    new = create_luks(SECRET)
    header = parse_luks_header(new.start, new.length)
    assert header.slots[0].iterations >= 1000
    assert header.mk_digest_iterations >= 1000
    # Sixteen times the work takes longer, whatever the machine: it was not a constant.
    monkeypatch.setattr(luks, "UNLOCK_SECONDS", 0.32)
    again = parse_luks_header(create_luks(SECRET).start, new.length)
    assert again.slots[0].iterations > header.slots[0].iterations


def test_keys_are_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = bytes(range(64))
    cipher = SectorCipher(CipherSpec(), key)
    new = create_luks(SECRET, iterations=1000)
    with pytest.raises(OpenFailed) as caught:
        open_luks(
            lambda offset, length: new.start[offset : offset + length], new.length, b"hunter2"
        )
    shown = f"{cipher!r} {cipher} {new!r} {caught.value!r} {caplog.text}"
    assert "hunter2" not in shown
    assert SECRET.decode() not in shown
    assert repr(key)[2:10] not in shown
    assert key.hex()[:8] not in shown
    assert repr(new.start[:6])[2:] not in shown


# -- hostile headers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (0, b"LUKS\xba\xbf", "no LUKS header"),
        (6, b"\0\2", "version 2"),
        (8, b"a\x1b[2Jes\0", "no text"),
        (72, b"md5\0", "hash 'md5'"),
        (72, b"shake_128\0", "hash 'shake_128'"),
        (108, struct.pack(">I", 0), "master key of 0 bytes"),
        (108, struct.pack(">I", 1 << 31), "master key of 2147483648 bytes"),
        (164, struct.pack(">I", 0), "0 LUKS iterations"),
        (164, struct.pack(">I", MAX_ITERATIONS + 1), "iterations are not supported"),
        (208, struct.pack(">I", 1), "state is 0x1"),
        (212, struct.pack(">I", 0), "0 LUKS iterations"),
        (212, struct.pack(">I", 0xFFFFFFFF), "4294967295 LUKS iterations"),
        (248, struct.pack(">I", 0), "lies outside"),
        (248, struct.pack(">I", 0xFFFFFFFF), "lies outside"),
        (248, struct.pack(">I", 4000), "lies outside"),
        (252, struct.pack(">I", 3999), "3999 stripes"),
        (252, struct.pack(">I", 0xFFFFFFFF), "stripes"),
    ],
)
def test_bad_headers_are_refused(area: Area, offset: int, value: bytes, problem: str) -> None:
    area.data[offset : offset + len(value)] = value
    with pytest.raises(CorruptImage, match=problem):
        area.open()


@given(
    places=st.lists(st.integers(0, HEADER_BYTES - 1), min_size=1, max_size=4),
    values=st.lists(st.integers(0, 255), min_size=4, max_size=4),
)
def test_a_damaged_header_gives_deliberate_errors_alone(
    made: bytes, places: list[int], values: list[int]
) -> None:
    data = bytearray(made)
    for place, value in zip(places, values, strict=False):
        data[place] = value
    # Numbers of iterations stay small, because any up to the limit are really carried out.
    for place in (164, 212):
        data[place : place + 4] = made[place : place + 4]
    with suppress(DriverError):
        Area(data).open()


@pytest.mark.parametrize(
    ("name", "mode", "key_bytes"),
    [
        ("serpent", "xts-plain64", 64),
        ("aes", "xts-plain64", 48),
        ("aes", "ctr-plain64", 32),
        ("aes", "cbc-plain64", 24),
        ("aes", "cbc-essiv", 32),
        ("aes", "cbc-essiv:sha1", 32),
        ("aes", "cbc", 32),
        ("aes", "", 32),
    ],
)
def test_ciphers_that_are_not_supported_are_named(name: str, mode: str, key_bytes: int) -> None:
    with pytest.raises(OpenFailed, match=f"{name}-{mode} with a key of {key_bytes * 8} bits"):
        parse_cipher(name, mode, key_bytes)
    # QEMU writes a hash after any generator, and uses it for essiv alone.
    assert parse_cipher("aes", "xts-plain64:sha256", 64) == CipherSpec()


def test_a_master_key_that_xts_forbids_is_refused() -> None:
    with pytest.raises(CorruptImage, match="halves"):
        SectorCipher(CipherSpec(), b"k" * 64)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "says nowhere how"),
        (struct.pack(">QQ", 0, 4096), "can't be at 0"),
        (struct.pack(">QQ", 512, 4096), "can't be at 512"),
        (struct.pack(">QQ", 1 << 56, 4096), "can't be at"),
        (struct.pack(">QQ", 65536, 100), "100 bytes"),
        (struct.pack(">QQ", 65536, 1 << 40), "bytes is impossible"),
    ],
)
def test_bad_pointers_to_the_area_are_refused(data: bytes, problem: str) -> None:
    header = Header(crypt_method=CryptMethod.LUKS).with_extension(ExtensionType.ENCRYPTION, data)
    with pytest.raises(CorruptImage, match=problem):
        crypto_area(header)


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(offset: int, length: int) -> bytes:
        raise AssertionError((offset, length))

    assert open_encryption(Header(), read, SECRET) is None
    with pytest.raises(OpenFailed, match="key-file=/PATH or key-credential=NAME"):
        open_encryption(Header(crypt_method=CryptMethod.LUKS), read, None)
    with pytest.raises(OpenFailed, match="convert it to LUKS"):
        open_encryption(Header(crypt_method=CryptMethod.AES), read, SECRET)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(OpenFailed, match=r"pip install 'xbd\[luks\]'"):
        create_luks(SECRET, iterations=1000)


# -- parts --------------------------------------------------------------------------------------


@given(
    key=st.binary(min_size=16, max_size=64),
    stripes=st.integers(2, 20),
    hash_spec=st.sampled_from(["sha1", "sha256", "sha512"]),
)
def test_what_was_split_is_merged(key: bytes, stripes: int, hash_spec: str) -> None:
    material = split(key, stripes, hash_spec)
    assert len(material) == len(key) * stripes
    assert merge(material, stripes, hash_spec) == key
    damaged = bytearray(material)
    damaged[0] ^= 1
    assert merge(damaged, stripes, hash_spec) != key


@given(
    spec=st.sampled_from(SPECS),
    first=st.integers(0, 1 << 54),
    sectors=st.integers(0, 5),
    at=st.integers(0, 4),
)
def test_sectors_are_independent_of_each_other(
    spec: CipherSpec, first: int, sectors: int, at: int
) -> None:
    cipher = SectorCipher(spec, os.urandom(spec.key_bytes))
    plain = os.urandom(sectors * SECTOR)
    data = bytearray(plain)
    cipher.encrypt(data, first)
    if at < sectors:
        one = bytearray(data[at * SECTOR : (at + 1) * SECTOR])
        cipher.decrypt(one, first + at)
        assert one == plain[at * SECTOR : (at + 1) * SECTOR]
    cipher.decrypt(memoryview(data), first)
    assert data == plain


def test_areas_are_laid_out_as_qemu_does(default_image: Path) -> None:
    walk = Walk.open(default_image)
    offset, length = crypto_area(walk.header)
    header = parse_luks_header(walk.read(offset, HEADER_BYTES), length)
    starts, end = area_sectors(64)
    assert [slot.key_offset for slot in header.slots] == starts
    assert end == header.payload_offset
    assert end * SECTOR == length
    assert pack_luks_header(header)[:104] == walk.read(offset, 104)


# -- secrets ------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "key"
        path.write_bytes(content)
        path.chmod(0o600)
        return path

    return write


def test_all_bytes_of_a_key_file_count(key_file: Callable[[bytes], Path]) -> None:
    assert read_secret(None, None) is None
    assert read_secret(key_file(b"geheim"), None) == b"geheim"
    assert read_secret(key_file(b"geheim\n"), None) == b"geheim\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"tic\0tac", "no text in UTF-8"),
        (b"\xff\xfe", "no text in UTF-8"),
        (b"x" * (MAX_SECRET_BYTES + 1), "is longer than"),
    ],
)
def test_what_qemu_would_not_take_is_refused(
    key_file: Callable[[bytes], Path], content: bytes, problem: str
) -> None:
    path = key_file(content)
    with pytest.raises(OpenFailed, match=problem) as caught:
        read_secret(path, None)
    assert str(path) in str(caught.value)
    assert "tac" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (
        (tmp_path / "missing", "ENOENT"),
        (tmp_path, "is a directory"),
        (tmp_path / "pipe", "is a named pipe"),
        (Path("/dev/zero"), "is a character device"),
    ):
        with pytest.raises(OpenFailed, match=problem):
            read_secret(path, None)


def test_a_key_file_that_everybody_can_read_is_worth_a_warning(
    key_file: Callable[[bytes], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = key_file(b"geheim")
    read_secret(path, None)
    assert not caplog.records
    path.chmod(0o604)
    assert read_secret(path, None) == b"geheim"
    assert "chmod o=" in caplog.text
    assert "geheim" not in caplog.text


def test_credentials_come_from_systemd(
    key_file: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = key_file(b"geheim")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(OpenFailed, match="LoadCredential=key:"):
        read_secret(None, "key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(path.parent))
    assert read_secret(None, "key") == b"geheim"
    for name in ("../key", "/etc/passwd", ".", "..", "", ".key", "a\nb", "x" * 256):
        with pytest.raises(OpenFailed, match="can't be a credential's name"):
            read_secret(None, name)
    with pytest.raises(OpenFailed, match="not both"):
        read_secret(path, "key")
