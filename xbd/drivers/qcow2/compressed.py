"""Compressed clusters: packing, unpacking, and those unpacked last.

Source: QEMU's docs/interop/qcow2.rst, "Compressed Clusters Descriptor" and the header's
compression_type; RFC 1951 (deflate), RFC 8878 (zstd).
"""

from __future__ import annotations

import errno
import importlib
import threading
import zlib
from collections import OrderedDict
from typing import Any, Final, Protocol

from xbd.core.driver import OpenFailed
from xbd.core.units import MIB
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.layout import CompressionType, compressed_extent

Bytes = bytes | bytearray | memoryview

CACHE_BYTES: Final = 16 * MIB
CACHE_ENTRIES: Final = 4096

_WRITE_WINDOW: Final = -12
"""Raw deflate that looks back 4 KiB at most: QEMU reads no more."""
_READ_WINDOW: Final = -15
_MEMORY_LEVEL: Final = 9
_ZSTD_WINDOW: Final = 8 * MIB
"""More than any cluster needs; a hostile frame can ask for gigabytes."""


class Codec(Protocol):
    """One compression type.  Thread-safe; gives the GIL up while it works."""

    @property
    def gradual(self) -> bool:
        """Whether the beginning of a cluster can be had for less than all of it."""
        ...

    def beginning(self, data: Bytes, length: int) -> bytes:
        """As `decompress`, but only so many bytes; `data` may lack what is not needed for them."""
        ...

    def decompress(self, data: Bytes, cluster_size: int) -> bytes:
        """The cluster that `data` begins with: exactly `cluster_size` bytes.

        What follows it in `data` is not looked at, because the descriptor counts whole sectors.
        Raises `CorruptImage`.
        """
        ...

    def compress(self, data: Bytes, cluster_size: int) -> bytes | None:
        """A whole cluster packed; None: that would not save a sixteenth of it."""
        ...


def codec_for(compression: CompressionType) -> Codec:
    """Raises `OpenFailed` if what it needs is not installed."""
    if compression is CompressionType.ZSTD:
        return ZstdCodec()
    return DeflateCodec()


def _worthwhile(packed: bytes, cluster_size: int) -> bytes | None:
    return packed if len(packed) <= cluster_size - cluster_size // 16 else None


def _require_whole(data: bytes, cluster_size: int) -> bytes:
    if len(data) != cluster_size:
        raise CorruptImage(f"{len(data)} bytes came out instead of {cluster_size}")
    return data


class DeflateCodec:
    """Compression type 0.

    With isal (the extra ``fast``) it unpacks twice and packs ten times as fast, and packs a
    little less tightly.
    """

    gradual: Final = True

    def __init__(self, *, fast: bool = True) -> None:
        """`fast`: by isal, if it is installed."""
        self._isal: Any = _optional("isal.isal_zlib") if fast else None

    def decompress(self, data: Bytes, cluster_size: int) -> bytes:
        if self._isal is not None:
            try:
                return _require_whole(_inflate(self._isal, data, cluster_size), cluster_size)
            except (self._isal.error, CorruptImage):
                pass  # zlib has the last word on what is corrupt
        return self.beginning(data, cluster_size)

    def beginning(self, data: Bytes, length: int) -> bytes:
        # Not by isal: it unpacks 64 KiB at least, whatever it is asked for.
        try:
            return _require_whole(_inflate(zlib, data, length), length)
        except zlib.error as error:
            raise CorruptImage(f"it is no deflate stream: {error}") from None

    def compress(self, data: Bytes, cluster_size: int) -> bytes | None:
        library: Any = self._isal or zlib
        level = library.Z_DEFAULT_COMPRESSION
        packer = library.compressobj(level, library.DEFLATED, _WRITE_WINDOW, _MEMORY_LEVEL)
        return _worthwhile(packer.compress(data) + packer.flush(), cluster_size)


def _inflate(library: Any, data: Bytes, cluster_size: int) -> bytes:
    unpacked: bytes = library.decompressobj(_READ_WINDOW).decompress(data, cluster_size)
    return unpacked


class ZstdCodec:
    """Compression type 1; as QEMU does, several frames in a row are taken for one."""

    gradual: Final = False
    """Most clusters are one block, which is unpacked as a whole."""

    def __init__(self) -> None:
        """Raises `OpenFailed` without the package zstandard."""
        self._zstd: Any = _optional("zstandard")
        if self._zstd is None:
            raise OpenFailed(
                "clusters compressed with zstd need the Python package zstandard: install it with "
                "pip install 'xbd[zstd]'",
                errno=errno.EOPNOTSUPP,
            )

    def decompress(self, data: Bytes, cluster_size: int) -> bytes:
        # One for each call: they are not thread-safe.
        unpacker = self._zstd.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        with unpacker.stream_reader(data, read_across_frames=True) as stream:
            try:
                return _require_whole(stream.read(cluster_size), cluster_size)
            except self._zstd.ZstdError as error:
                raise CorruptImage(f"it is no zstd frame: {error}") from None

    def beginning(self, data: Bytes, length: int) -> bytes:
        return self.decompress(data, length)

    def compress(self, data: Bytes, cluster_size: int) -> bytes | None:
        return _worthwhile(self._zstd.ZstdCompressor().compress(data), cluster_size)


def _optional(name: str) -> Any:
    """A module, or None if its package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class ClusterCache:
    """Unpacked clusters, or their beginnings, by L2 entries; those used last.  Thread-safe."""

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._clusters: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, entry: int) -> bytes | None:
        """What there is of the cluster that a compressed L2 entry names."""
        with self._lock:
            data = self._clusters.get(entry)
            if data is not None:
                self._clusters.move_to_end(entry)
            return data

    def put(self, entry: int, data: bytes) -> None:
        """Keep an unpacked cluster for a while."""
        with self._lock:
            self._drop(entry)
            self._clusters[entry] = data
            self._bytes += len(data)
            while self._bytes > self._most_bytes or len(self._clusters) > CACHE_ENTRIES:
                self._drop(next(iter(self._clusters)))

    def forget(self, host_offset: int, length: int, cluster_bits: int) -> None:
        """Drop what was packed in this range of the host file, which gets other content."""
        with self._lock:
            end = host_offset + length
            for entry in list(self._clusters):
                offset, size = compressed_extent(entry, cluster_bits)
                if offset < end and host_offset < offset + size:
                    self._drop(entry)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._clusters.clear()
            self._bytes = 0

    def _drop(self, entry: int) -> None:
        data = self._clusters.pop(entry, b"")
        self._bytes -= len(data)
