"""The header of qcow2 images: QEMU's come back byte for byte, impossible ones are refused."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcow2_seeds import NAMES, Seed, Seeds, image, run, seeds

from xbd.core.driver import DriverError, OpenFailed
from xbd.core.units import GIB, MIB
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import (
    Extension,
    Header,
    feature_names,
    looks_like_qcow2,
    pack_header,
    parse_header,
)
from xbd.drivers.qcow2.layout import (
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    ExtensionType,
    Incompatible,
)
from xbd.drivers.qcow2.opening import Wishes, open_image

__all__ = ["image", "seeds"]

CLUSTER = 65536


def some_header(**changes: object) -> Header:
    header = Header(
        size=GIB,
        l1_size=2,
        l1_table_offset=3 * CLUSTER,
        refcount_table_offset=CLUSTER,
        refcount_table_clusters=1,
        extensions=(feature_names(),),
    )
    return attrs.evolve(header, **changes)


def packed(**changes: object) -> bytes:
    return pack_header(some_header(**changes)).ljust(CLUSTER, b"\0")


def patched(offset: int, layout: str, *values: object, **changes: object) -> bytes:
    """A good header with something else at an offset."""
    data = bytearray(packed(**changes))
    struct.pack_into(layout, data, offset, *values)
    return bytes(data)


# -- QEMU's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_qemus_headers_come_back_byte_for_byte(image: Seed) -> None:
    first = image.path.read_bytes()[: 2 * MIB]
    header = parse_header(first)
    data = pack_header(header)
    assert data == first[: len(data)]
    assert not any(first[len(data) : header.cluster_size])
    assert parse_header(data) == header


@pytest.mark.parametrize("name", NAMES)
def test_the_fields_are_what_qemu_says(image: Seed, name: str) -> None:
    header = parse_header(image.path.read_bytes()[: 2 * MIB])
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", image.path).stdout)
    details = told["format-specific"]["data"]
    assert header.size == told["virtual-size"]
    assert header.cluster_size == told["cluster-size"]
    assert header.version == {"0.10": 2, "1.1": 3}[details["compat"]]
    assert header.refcount_bits == details["refcount-bits"]
    assert header.nb_snapshots == len(told.get("snapshots", []))
    assert header.backing_file == told.get("backing-filename")
    assert header.backing_format == told.get("backing-filename-format")
    assert header.compression_type.name.lower() == details.get("compression-type", "zlib")
    assert header.extended_l2 == details.get("extended-l2", False)
    assert bool(header.compatible & Compatible.LAZY_REFCOUNTS) == details.get(
        "lazy-refcounts", False
    )
    assert bool(header.incompatible & Incompatible.DIRTY) == told.get("dirty-flag", False)
    assert bool(header.incompatible & Incompatible.CORRUPT) == details.get("corrupt", False)
    assert (header.data_file is not None) == (details.get("data-file") is not None)
    assert header.raw_data_file == details.get("data-file-raw", False)
    assert (header.crypt_method is CryptMethod.LUKS) == ("encrypt" in details)
    assert bool(header.autoclear & Autoclear.BITMAPS) == ("bitmaps" in details)


def test_what_qemu_reads_of_our_header_is_what_it_says(seeds: Seeds, tmp_path: Path) -> None:
    """Every name and number is changed, as far as the image allows it."""
    seed = seeds.copy("plain", tmp_path / "image")
    header = parse_header(seed.path.read_bytes()[:CLUSTER])
    (tmp_path / "behind").write_bytes(bytes(MIB))
    header = attrs.evolve(
        header,
        backing_file="behind",
        compatible=int(Compatible.LAZY_REFCOUNTS),
        incompatible=int(Incompatible.CORRUPT),
    ).with_extension(ExtensionType.BACKING_FORMAT, b"raw")
    with seed.path.open("r+b") as file:
        file.write(pack_header(header))
    told = json.loads(run("qemu-img", "info", "--output=json", seed.path).stdout)
    assert told["backing-filename"] == "behind"
    assert told["backing-filename-format"] == "raw"
    assert told["format-specific"]["data"]["corrupt"] is True
    assert told["format-specific"]["data"]["lazy-refcounts"] is True


# -- refusals -----------------------------------------------------------------------------------

IMPOSSIBLE = {
    "another magic": patched(0, ">I", 0x514649FC),
    "version 1": patched(4, ">I", 1),
    "version 4": patched(4, ">I", 4),
    "a backing name beyond the cluster": patched(8, ">QI", CLUSTER - 4, 8),
    "a backing name in the header": patched(8, ">QI", 16, 8),
    "a backing name nowhere": patched(8, ">Q", 1 << 63),
    "a backing name of 1024 bytes": patched(8, ">QI", 4096, 1024),
    "clusters of 256 bytes": patched(20, ">I", 8),
    "clusters of 4 MiB": patched(20, ">I", 22),
    "2^(2^32) bytes a cluster": patched(20, ">I", 0xFFFFFFFF),
    "a negative size": patched(24, ">Q", 1 << 63),
    "an unknown crypt method": patched(32, ">I", 3),
    "LUKS without a header": patched(32, ">I", 2),
    "an L1 table too short": patched(36, ">I", 1),
    "an L1 table of more than 32 MiB": patched(36, ">I", (32 * MIB // 8) + 1),
    "an L1 table inside a cluster": patched(40, ">Q", 3 * CLUSTER + 8),
    "an L1 table at 0": patched(40, ">Q", 0),
    "an L1 table behind all": patched(40, ">Q", 1 << 60),
    "a refcount table inside a cluster": patched(48, ">Q", CLUSTER + 512),
    "a refcount table at 0": patched(48, ">Q", 0),
    "a refcount table behind all": patched(48, ">Q", 1 << 63),
    "no refcount table": patched(56, ">I", 0),
    "a refcount table of more than 8 MiB": patched(56, ">I", 129),
    "65537 snapshots": patched(60, ">IQ", 65537, CLUSTER),
    "snapshots at 0": patched(60, ">I", 1),
    "snapshots inside a cluster": patched(60, ">IQ", 1, CLUSTER + 1),
    "an unknown incompatible feature": patched(72, ">Q", 1 << 5),
    "the last incompatible feature": patched(72, ">Q", 1 << 63),
    "refcounts of 128 bits": patched(96, ">I", 7),
    "refcounts of 2^(2^32) bits": patched(96, ">I", 0xFFFFFFFF),
    "a header of 96 bytes": patched(100, ">I", 96),
    "a header longer than the cluster": patched(100, ">I", CLUSTER + 8),
    "an unknown compression type": patched(104, ">B", 2),
    "zstd without its feature bit": patched(104, ">B", 1),
    "the feature bit without zstd": patched(72, ">Q", int(Incompatible.COMPRESSION_TYPE)),
    "extended entries in clusters of 8 KiB": packed(
        incompatible=int(Incompatible.EXTENDED_L2), cluster_bits=14
    )[:20]
    + struct.pack(">I", 13)
    + packed(incompatible=int(Incompatible.EXTENDED_L2), cluster_bits=14)[24:8192],
    "an extension without end": patched(116, ">I", 0xFFFFFFF0),
    "an extension beyond the cluster": patched(116, ">I", CLUSTER),
    "an extension across the backing name": patched(8, ">QI", 256, 8),
    "nothing": b"",
    "71 bytes": packed()[:71],
    "103 bytes": packed()[:103],
    "half of a header": patched(100, ">I", 200)[:150],
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_an_impossible_header_is_refused(what: str) -> None:
    with pytest.raises(CorruptImage) as caught:
        parse_header(IMPOSSIBLE[what])
    assert str(caught.value).isprintable()


QEMU_IS_PATIENT = {
    # It opens these, and finds other things wrong.
    "an L1 table at 0",
    "an L1 table behind all",
    "a refcount table at 0",
    "snapshots at 0",
    "a backing name in the header",
    "half of a header",
}


@pytest.mark.parametrize("what", sorted(IMPOSSIBLE.keys() - QEMU_IS_PATIENT))
def test_qemu_refuses_it_too(what: str, seeds: Seeds, tmp_path: Path) -> None:
    data = IMPOSSIBLE[what]
    path = tmp_path / "image"
    path.write_bytes(data.ljust(4 * CLUSTER, b"\0") if len(data) > 512 else data)
    assert run("qemu-img", "info", "-f", "qcow2", path, good=False).returncode != 0


def test_the_good_header_that_the_impossible_ones_are_made_of_is_taken() -> None:
    assert parse_header(packed()) == some_header()


def test_unknown_features_are_told_by_the_names_that_the_image_gives_them() -> None:
    names = struct.pack(">BB46s", 0, 7, b"time travel") + struct.pack(">BB46s", 1, 8, b"harmless")
    header = some_header(
        incompatible=1 << 7 | 1 << 8,
        extensions=(Extension(ExtensionType.FEATURE_NAMES, names + b"half an entry"),),
    )
    with pytest.raises(CorruptImage, match=r"time travel, incompatible feature bit 8$"):
        parse_header(pack_header(header))


def test_a_feature_name_cannot_forge_a_terminal() -> None:
    names = struct.pack(">BB46s", 0, 7, b"\x1b[31mred\n")
    header = some_header(
        incompatible=1 << 7, extensions=(Extension(ExtensionType.FEATURE_NAMES, names),)
    )
    with pytest.raises(CorruptImage) as caught:
        parse_header(pack_header(header))
    assert str(caught.value).isprintable()


# -- what is kept -------------------------------------------------------------------------------


def test_what_is_unknown_is_kept() -> None:
    header = some_header(
        compatible=0xF0, autoclear=0x80, unknown_tail=bytes(range(16)), header_length=128
    )
    header = attrs.evolve(
        header, extensions=(Extension(0x12345678, b"odd"), *header.extensions, Extension(7, b""))
    )
    assert parse_header(pack_header(header)) == header


def test_version_2_has_none_of_the_newer_fields() -> None:
    header = some_header(version=2, header_length=72, extensions=())
    data = pack_header(header)
    assert len(data) == 72 + 8
    assert parse_header(data.ljust(CLUSTER, b"\0")) == header


def test_a_header_without_a_compression_type_stays_one() -> None:
    header = some_header(header_length=104)
    data = pack_header(header)
    assert data[100:104] == struct.pack(">I", 104)
    assert parse_header(data) == header


@pytest.mark.parametrize("length", [105, 108, 111])
def test_a_compression_type_survives_a_header_that_ends_right_behind_it(length: int) -> None:
    whole = some_header(
        compression_type=CompressionType.ZSTD,
        incompatible=int(Incompatible.COMPRESSION_TYPE),
        extensions=(),
    )
    data = bytearray(packed(**{f.name: getattr(whole, f.name) for f in attrs.fields(Header)}))
    struct.pack_into(">I", data, 100, length)
    header = parse_header(bytes(data))
    assert parse_header(pack_header(header)).compression_type is CompressionType.ZSTD


def test_extensions_are_replaced_and_dropped() -> None:
    header = some_header().with_extension(ExtensionType.BACKING_FORMAT, b"raw")
    header = header.with_extension(ExtensionType.BACKING_FORMAT, b"qcow2")
    assert header.backing_format == "qcow2"
    assert parse_header(pack_header(header)) == header
    assert header.with_extension(ExtensionType.BACKING_FORMAT, None) == some_header()


def test_names_that_are_no_utf_8_come_back_as_they_were() -> None:
    name = b"/images/\xff\xfe.raw".decode("utf-8", "surrogateescape")
    header = some_header(backing_file=name)
    data = pack_header(header)
    assert data.endswith(b"/images/\xff\xfe.raw")
    assert parse_header(data).backing_file == name


def test_a_header_that_does_not_fit_into_its_cluster_is_refused() -> None:
    header = some_header(cluster_bits=9, l1_size=1 << 15, l1_table_offset=1024, size=MIB)
    header = attrs.evolve(header, refcount_table_offset=512, extensions=(Extension(1, bytes(400)),))
    with pytest.raises(CorruptImage, match="does not fit"):
        pack_header(header)


def test_only_known_versions_look_like_qcow2() -> None:
    assert looks_like_qcow2(packed())
    assert looks_like_qcow2(packed()[:8])
    assert not looks_like_qcow2(packed()[:7])
    assert not looks_like_qcow2(patched(4, ">I", 1))
    assert not looks_like_qcow2(bytes(8))


@given(st.binary(max_size=700), st.integers(0, 3))
def test_no_bytes_raise_anything_else(junk: bytes, kind: int) -> None:
    data = bytearray(packed()[:4096])
    if kind == 0:
        data = bytearray(junk)
    elif kind == 1:
        data[8 : 8 + len(junk)] = junk
    else:
        for place in range(0, len(junk) - 2, 3):
            data[int.from_bytes(junk[place : place + 2], "big") % 600] = junk[place + 2]
    try:
        header = parse_header(bytes(data))
        again = pack_header(header)
    except DriverError:
        return
    assert parse_header(again.ljust(4096, b"\0")).size == header.size


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    """That could wait for ever."""
    path = tmp_path / "image"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        else:
            listener.bind(str(path))
        for writable in (False, True):
            with pytest.raises(OpenFailed, match="not an image file"):
                open_image(path, Wishes(writable=writable))
