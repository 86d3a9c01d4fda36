"""Dirty bitmaps: found where QEMU put them, and marked when writes pass them by."""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcow2_seeds import Seed, Seeds, qemu_check, run, seeds

from xbd.core.units import MIB
from xbd.drivers.qcow2 import bitmaps
from xbd.drivers.qcow2.bitmaps import (
    Bitmap,
    BitmapFlag,
    bitmap_data,
    directory_of,
    load_bitmaps,
    mark_in_use,
    parse_directory,
)
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host, open_host
from xbd.drivers.qcow2.layout import Autoclear, ExtensionType
from xbd.drivers.qcow2.offline import read_header

__all__ = ["seeds"]

EXTENSION = struct.Struct(">IIQQ")
ENTRY = struct.Struct(">QIIBBHI")


@pytest.fixture
def seed(seeds: Seeds, tmp_path: Path) -> Seed:
    return seeds.copy("bitmaps", tmp_path / "image")


@pytest.fixture
def host(seed: Seed) -> Iterator[Host]:
    host = open_host(seed.path, writable=True)
    yield host
    host.close()


@pytest.fixture
def header(host: Host) -> Header:
    return read_header(host)


def qemu_bitmaps(seed: Seed) -> list[dict[str, Any]]:
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", seed.path).stdout)
    return list(told["format-specific"]["data"]["bitmaps"])


def test_bitmaps_are_what_qemu_says(seed: Seed, host: Host, header: Header) -> None:
    told = qemu_bitmaps(seed)
    found = load_bitmaps(host, header)
    assert [(bitmap.name, bitmap.granularity) for bitmap in found] == [
        (bitmap["name"], bitmap["granularity"]) for bitmap in told
    ]
    assert [bitmap.flags for bitmap in found] == [BitmapFlag.AUTO, BitmapFlag(0)]
    assert [bitmap["flags"] for bitmap in told] == [["auto"], []]


def test_the_clusters_of_a_bitmap_hold_its_bits(host: Host, header: Header) -> None:
    followed = load_bitmaps(host, header)[0]
    (place,) = bitmap_data(host, header, followed)
    # The writes of the recipe: 200 KiB at 0, 64 KiB at 1 MiB, 300 KiB at 1500 KiB, zeroes there.
    bits = int.from_bytes(host.read(place, 8), "little")
    written = {bit for bit in range(64) if bits >> bit & 1}
    assert written == {0, 1, 2, 3, 16, 17, *range(23, 29)}


def test_those_that_follow_writes_are_marked_and_no_others(
    seed: Seed, host: Host, header: Header
) -> None:
    before = seed.path.read_bytes()
    mark_in_use(host, header)
    after = seed.path.read_bytes()
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
    assert [bitmap["flags"] for bitmap in qemu_bitmaps(seed)] == [["in-use", "auto"], []]
    flags = [bitmap.flags for bitmap in load_bitmaps(host, header)]
    assert flags == [BitmapFlag.IN_USE | BitmapFlag.AUTO, BitmapFlag(0)]
    host.close()
    found = qemu_check(seed)
    assert found is not None
    assert not found.keys() & {"leaks", "corruptions"}


def test_marking_is_durable_once_and_not_repeated(
    host: Host, header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    write = host.write
    monkeypatch.setattr(host, "write", lambda at, data: (done.append("write"), write(at, data)))
    monkeypatch.setattr(host, "flush", lambda: done.append("flush"))
    mark_in_use(host, header)
    assert done == ["write", "flush"]
    mark_in_use(host, header)
    assert done == ["write", "flush"]


def test_qemu_refuses_to_use_a_marked_bitmap_and_keeps_the_other(
    seed: Seed, host: Host, header: Header
) -> None:
    mark_in_use(host, header)
    host.close()
    refused = run("qemu-img", "bitmap", "--merge", "followed", seed.path, "kept", good=False)
    assert "inconsistent" in refused.stderr
    run("qemu-img", "bitmap", "--add", seed.path, "third")
    run("qemu-img", "bitmap", "--merge", "kept", seed.path, "third")


def test_bitmaps_that_somebody_passed_by_are_none(host: Host, header: Header) -> None:
    header = attrs.evolve(header, autoclear=0)
    assert directory_of(header) is None
    assert load_bitmaps(host, header) == ()
    before = host.read(0, host.size())
    mark_in_use(host, header)
    assert host.read(0, host.size()) == before


def test_an_image_without_bitmaps(seeds: Seeds, tmp_path: Path) -> None:
    host = open_host(seeds.copy("plain", tmp_path / "image").path, writable=True)
    assert load_bitmaps(host, read_header(host)) == ()
    mark_in_use(host, read_header(host))
    host.close()


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reserved", "size", "offset"),
    [
        (0, 0, 80, 4096),
        (65536, 0, 65536 * 32, 4096),
        (1, 1, 80, 4096),
        (1, 0, 8, 4096),
        (1, 0, 64 * MIB + 8, 4096),
        (1, 0, 80, 0),
        (1, 0, 80, 4096 + 8),
        (1, 0, 80, 1 << 60),
    ],
)
def test_an_impossible_extension(
    header: Header, number: int, reserved: int, size: int, offset: int
) -> None:
    data = EXTENSION.pack(number, reserved, size, offset)
    with pytest.raises(CorruptImage):
        directory_of(header.with_extension(ExtensionType.BITMAPS, data))


def test_an_extension_that_is_missing_or_short(header: Header) -> None:
    for data in (None, b"", bytes(23), bytes(25)):
        with pytest.raises(CorruptImage):
            directory_of(header.with_extension(ExtensionType.BITMAPS, data))


def entry(
    table: int = 8192,
    size: int = 1,
    flags: int = 0,
    kind: int = 1,
    bits: int = 16,
    name: bytes = b"one",
    extra: bytes = b"",
) -> bytes:
    data = ENTRY.pack(table, size, flags, kind, bits, len(name), len(extra)) + extra + name
    return data + bytes(-len(data) % 8)


def test_a_good_entry_with_extra_data(header: Header) -> None:
    (bitmap,) = parse_directory(entry(flags=4, extra=b"unknown"), 1, header)
    assert bitmap == Bitmap(
        table_offset=8192,
        table_size=1,
        flags=BitmapFlag.EXTRA_DATA_COMPATIBLE,
        granularity_bits=16,
        name="one",
        extra_data=b"unknown",
        entry_at=0,
    )


IMPOSSIBLE = {
    "cut": (entry()[:16], 1),
    "a name beyond the end": (entry(name=b"x" * 40)[:40], 1),
    "more than told": (entry() + entry(name=b"two"), 1),
    "fewer than told": (entry(), 2),
    "an unaligned table": (entry(table=8200), 1),
    "a table at 0": (entry(table=0), 1),
    "a table behind all": (entry(table=1 << 60), 1),
    "no table": (entry(size=0), 1),
    "a bitmap of more than 512 MiB": (entry(size=1 << 20), 1),
    "unknown flags": (entry(flags=8), 1),
    "another type": (entry(kind=2), 1),
    "bits too fine": (entry(bits=8), 1),
    "bits too coarse": (entry(bits=32), 1),
    "no name": (entry(name=b""), 1),
    "a name too long": (entry(name=b"x" * 1024), 1),
    "twice the same": (entry() + entry(), 2),
    "too short for the disk": (entry(bits=9, size=1), 1),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_an_impossible_directory(header: Header, what: str) -> None:
    data, number = IMPOSSIBLE[what]
    if what == "too short for the disk":
        header = attrs.evolve(header, size=1 << 40)
    with pytest.raises(CorruptImage) as caught:
        parse_directory(data, number, header)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("word", [1 << 1, 1 << 8, 1 << 56, 1 << 63, 4096 | 1, 4096 | 512], ids=hex)
def test_an_impossible_bitmap_table(host: Host, header: Header, word: int) -> None:
    followed = load_bitmaps(host, header)[0]
    host.write(followed.table_offset, word.to_bytes(8, "big"))
    with pytest.raises(CorruptImage, match=hex(word)):
        bitmap_data(host, header, followed)


@pytest.mark.parametrize("word", [0, 1])
def test_a_bitmap_of_zeroes_or_ones_has_no_clusters(host: Host, header: Header, word: int) -> None:
    followed = load_bitmaps(host, header)[0]
    host.write(followed.table_offset, word.to_bytes(8, "big"))
    assert bitmap_data(host, header, followed) == array("Q")


def test_what_lies_behind_the_files_end(host: Host, header: Header) -> None:
    directory = EXTENSION.pack(1, 0, 40, 1 << 40)
    far = header.with_extension(ExtensionType.BITMAPS, directory)
    with pytest.raises(CorruptImage, match="end"):
        load_bitmaps(host, far)
    with pytest.raises(CorruptImage, match="end"):
        mark_in_use(host, far)
    followed = attrs.evolve(load_bitmaps(host, header)[0], table_offset=1 << 40)
    with pytest.raises(CorruptImage, match="end"):
        bitmap_data(host, header, followed)


@given(st.binary(max_size=200), st.integers(1, 4), st.booleans())
def test_no_bytes_raise_anything_else(junk: bytes, number: int, good_start: bool) -> None:
    header = Header(
        size=MIB,
        l1_size=1,
        l1_table_offset=65536,
        refcount_table_offset=131072,
        refcount_table_clusters=1,
        autoclear=int(Autoclear.BITMAPS),
        extensions=(),
    )
    data = (entry(table=65536) if good_start else b"") + junk
    try:
        found = parse_directory(data, number, header)
    except CorruptImage:
        return
    assert len(found) == number
    assert all(bitmaps.MIN_GRANULARITY_BITS <= b.granularity_bits <= 31 for b in found)
