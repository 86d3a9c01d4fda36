"""Compressed clusters: those that QEMU wrote are read, and QEMU reads ours."""

from __future__ import annotations

import importlib
import os
import struct
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcow2_walk import Walk, prose, tool

from xbd.core.driver import OpenFailed
from xbd.core.units import MIB
from xbd.drivers.qcow2.compressed import (
    CACHE_ENTRIES,
    ClusterCache,
    Codec,
    DeflateCodec,
    ZstdCodec,
    codec_for,
)
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.layout import (
    COMPRESSED,
    CompressionType,
    compressed_entry,
    compressed_extent,
)

CLUSTER = 65536
TYPES = {CompressionType.ZLIB: "zlib", CompressionType.ZSTD: "zstd"}


def installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


needs_isal = pytest.mark.skipif(not installed("isal"), reason="needs isal")
needs_zstd = pytest.mark.skipif(not installed("zstandard"), reason="needs zstandard")


def codecs() -> list[object]:
    return [
        pytest.param(lambda: DeflateCodec(fast=False), id="zlib"),
        pytest.param(DeflateCodec, id="isal", marks=needs_isal),
        pytest.param(ZstdCodec, id="zstd", marks=needs_zstd),
    ]


@pytest.fixture(params=codecs())
def codec(request: pytest.FixtureRequest) -> Codec:
    made: Codec = request.param()
    return made


# -- QEMU ---------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_zstd
@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("compression", TYPES)
def test_what_qemu_packed_is_unpacked(
    tmp_path: Path, compression: CompressionType, bits: int
) -> None:
    size = 1 << bits
    content = prose(3 * size, bits) + bytes(size) + os.urandom(size) + prose(size, bits + 1)
    (tmp_path / "raw").write_bytes(content)
    tool(
        "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2",
        "-o", f"cluster_size={size},compression_type={TYPES[compression]}",
        tmp_path / "raw", tmp_path / "image",
    )  # fmt: skip
    walk = Walk.open(tmp_path / "image")
    assert walk.header.compression_type is compression
    readers = [codec_for(compression)]
    if compression is CompressionType.ZLIB:
        readers.append(DeflateCodec(fast=False))
    packed = 0
    for guest, entry, _ in walk.entries():
        if entry & COMPRESSED:
            data = walk.read(*compressed_extent(entry, bits))
            for codec in readers:
                assert codec.decompress(data, size) == content[guest : guest + size]
            packed += 1
    assert packed == 4


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_qemu_unpacks_what_we_packed(tmp_path: Path, codec: Codec, bits: int) -> None:
    size = 1 << bits
    image = tmp_path / "image"
    kind = "zstd" if isinstance(codec, ZstdCodec) else "zlib"
    options = f"cluster_size={size},compression_type={kind}"
    tool("qemu-img", "create", "-f", "qcow2", "-o", options, image, str(2 * size))
    tool("qemu-io", "-f", "qcow2", "-c", f"write -P 1 0 {2 * size}", image)
    walk = Walk.open(image)
    content = b""
    for guest, _, place in list(walk.entries()):
        # Far repetitions: a window larger than QEMU's would be used if it were allowed.
        plain = (prose(size // 2, guest) * 2)[:size]
        packed = codec.compress(plain, size)
        assert packed is not None
        room = size - len(packed)
        host = walk.host_offset(guest) + min(room, 100 if room >= 512 else 0)
        walk.write(host, packed)
        walk.write(place, struct.pack(">Q", compressed_entry(host, len(packed), bits)))
        content += plain
    tool("qemu-img", "check", "-f", "qcow2", image)
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == content


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_isal)])
def test_our_deflate_streams_look_back_no_further_than_qemu_promises(fast: bool) -> None:
    plain = prose(20000, 1) * 3
    packed = DeflateCodec(fast=fast).compress(plain, len(plain))
    assert packed is not None
    # Small pieces of output make zlib remember its window alone.
    reader = zlib.decompressobj(-12)
    unpacked = reader.decompress(packed, 64)
    while len(unpacked) < len(plain):
        unpacked += reader.decompress(reader.unconsumed_tail, 64)
    assert unpacked == plain


# -- by themselves ------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    bits=st.integers(9, 17),
    behind=st.binary(max_size=600),
    kind=st.sampled_from(list(CompressionType)),
)
def test_packing_and_unpacking(seed: int, bits: int, behind: bytes, kind: CompressionType) -> None:
    if kind is CompressionType.ZSTD and not installed("zstandard"):
        return
    plain = (prose(seed + 1, seed) * (1 << bits))[: 1 << bits]
    made = codec_for(kind)
    packed = made.compress(memoryview(plain), 1 << bits)
    if packed is not None:
        assert len(packed) <= (1 << bits) * 15 // 16
        assert made.decompress(memoryview(packed + behind), 1 << bits) == plain


def test_what_does_not_pack_is_left_alone(codec: Codec) -> None:
    assert codec.compress(os.urandom(CLUSTER), CLUSTER) is None
    nearly = os.urandom(CLUSTER - 1024) + bytes(1024)
    assert codec.compress(nearly, CLUSTER) is None
    assert codec.compress(os.urandom(CLUSTER // 2) + bytes(CLUSTER // 2), CLUSTER) is not None


def test_damage_is_told_as_such(codec: Codec) -> None:
    packed = codec.compress(prose(CLUSTER, 1), CLUSTER)
    assert packed is not None
    half = codec.compress(prose(CLUSTER // 2, 2), CLUSTER)
    assert half is not None
    for damaged in (b"", packed[:-100], packed[: len(packed) // 2], half, b"\xff" * 512):
        with pytest.raises(CorruptImage):
            codec.decompress(damaged, CLUSTER)
    with pytest.raises(CorruptImage, match="instead of 65536"):
        codec.decompress(half, CLUSTER)


def test_a_bomb_gives_one_cluster(codec: Codec) -> None:
    bomb = codec.compress(bytes(64 * MIB), 64 * MIB)
    assert bomb is not None
    assert len(bomb) < MIB
    tracemalloc.start()
    try:
        assert codec.decompress(bomb, 512) == bytes(512)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@needs_zstd
def test_zstd_frames_in_a_row_are_one_cluster() -> None:
    codec = ZstdCodec()
    parts = [prose(CLUSTER // 2, 1), prose(CLUSTER // 2, 2)]
    packed = b"".join(codec.compress(part, CLUSTER) or b"" for part in parts)
    assert codec.decompress(packed + b"behind", CLUSTER) == b"".join(parts)


@needs_zstd
def test_zstd_frames_that_ask_for_much_memory_are_refused() -> None:
    zstandard = importlib.import_module("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(prose(CLUSTER, 1)) + packer.flush()
    with pytest.raises(CorruptImage, match="memory"):
        ZstdCodec().decompress(packed, CLUSTER)


@needs_isal
@given(
    seed=st.integers(0, 50),
    size=st.sampled_from([512, 4096]),
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 40),
)
def test_isal_and_zlib_agree_on_everything(
    seed: int, size: int, damage: list[tuple[int, int]], cut: int
) -> None:
    packed = bytearray(zlib.compress(prose(size + cut, seed), 6, -12)[: None if not cut else -cut])
    for place, value in damage:
        packed[place % len(packed)] = value
    assert outcome(DeflateCodec(), packed, size) == outcome(DeflateCodec(fast=False), packed, size)


def outcome(codec: Codec, packed: bytes | bytearray, size: int) -> bytes | str:
    try:
        return codec.decompress(packed, size)
    except CorruptImage as error:
        return str(error)


def test_without_zstandard_the_text_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(OpenFailed, match=r"pip install 'xbd\[zstd\]'"):
        codec_for(CompressionType.ZSTD)


def test_without_isal_zlib_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    codec = codec_for(CompressionType.ZLIB)
    packed = codec.compress(prose(CLUSTER, 3), CLUSTER)
    assert packed is not None
    assert codec.decompress(packed, CLUSTER) == prose(CLUSTER, 3)


# -- the cache ----------------------------------------------------------------------------------


def entry(host: int, length: int = 1000, bits: int = 16) -> int:
    return compressed_entry(host, length, bits)


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = ClusterCache(3 * CLUSTER)
    for host in (1000, 2000, 3000):
        cache.put(entry(host), host.to_bytes(2, "big") * (CLUSTER // 2))
    assert cache.get(entry(1000)) is not None
    cache.put(entry(4000), bytes(CLUSTER))
    assert cache.get(entry(2000)) is None
    found = cache.get(entry(1000))
    assert found is not None
    assert found[:2] == (1000).to_bytes(2, "big")


def test_the_cache_is_bounded_in_bytes_and_in_clusters() -> None:
    cache = ClusterCache(CACHE_ENTRIES * 1024)
    for number in range(CACHE_ENTRIES + 10):
        cache.put(entry(number * 512, 100, 9), bytes(512))
    kept = [n for n in range(CACHE_ENTRIES + 10) if cache.get(entry(n * 512, 100, 9)) is not None]
    assert kept == list(range(10, CACHE_ENTRIES + 10))
    cache = ClusterCache(CLUSTER)
    cache.put(entry(0), bytes(CLUSTER))
    cache.put(entry(0), b"x" * CLUSTER)
    assert cache.get(entry(0)) == b"x" * CLUSTER
    cache.put(entry(1 << 20), bytes(2 * CLUSTER))
    assert cache.get(entry(0)) is None
    assert cache.get(entry(1 << 20)) is None


@pytest.mark.parametrize(
    ("start", "length", "forgotten"),
    [
        (0, 65536, False),
        (0, 65537, True),
        (65536, 65536, True),
        (66000, 1, True),
        (65536 + 1024, 65536, False),
    ],
)
def test_the_cache_forgets_ranges(start: int, length: int, forgotten: bool) -> None:
    cache = ClusterCache()
    cache.put(entry(65536), bytes(CLUSTER))  # 1000 bytes: two sectors
    cache.put(entry(1 << 30), bytes(CLUSTER))
    cache.forget(start, length, 16)
    assert (cache.get(entry(65536)) is None) is forgotten
    assert cache.get(entry(1 << 30)) is not None


def test_the_cache_is_used_by_many_threads() -> None:
    cache = ClusterCache(8 * 512)
    wrong: list[int] = []

    def use(first: int) -> None:
        for number in range(first, first + 2000):
            host = number % 32 * 512
            cache.put(entry(host, 100, 9), bytes([number % 32]) * 512)
            found = cache.get(entry(host, 100, 9))
            if found is not None and found != bytes([number % 32]) * 512:
                wrong.append(number)
            if number % 50 == 0:
                cache.forget(host, 512, 9)

    threads = [threading.Thread(target=use, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    cache.forget(0, 1 << 20, 9)
    assert all(cache.get(entry(n * 512, 100, 9)) is None for n in range(32))
