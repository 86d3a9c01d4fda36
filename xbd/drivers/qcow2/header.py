"""The header of a qcow2 image and its extensions, as bytes and as an object.

Source: QEMU's docs/interop/qcow2.rst, "Header" and "Header extensions".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import attrs

from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.layout import (
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    ExtensionType,
    Incompatible,
)

_V2: Final = struct.Struct(">IIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_FEATURE: Final = struct.Struct(">BB46s")

V2_LENGTH: Final = 72
V3_LENGTH: Final = 104
WITH_COMPRESSION_TYPE: Final = 112

_KNOWN_INCOMPATIBLE: Final = sum(Incompatible)

FEATURE_NAMES: Final = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)
"""Kind (incompatible, compatible, autoclear), bit and name: the names that QEMU writes."""


@attrs.frozen
class Extension:
    """A header extension, without padding."""

    type: int
    data: bytes


@attrs.frozen(kw_only=True)
class Header:
    """The fields under their names in the specification; sizes and offsets in bytes unless the
    specification's name says clusters or entries."""

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    crypt_method: CryptMethod = CryptMethod.NONE
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = WITH_COMPRESSION_TYPE
    compression_type: CompressionType = CompressionType.ZLIB
    extensions: tuple[Extension, ...] = ()
    backing_file: str | None = None
    unknown_tail: bytes = b""
    """Bytes of the header behind what is known here: kept as they are."""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & Incompatible.EXTERNAL_DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        return self.has_data_file and bool(self.autoclear & Autoclear.RAW_EXTERNAL_DATA)

    @property
    def l2_entry_bytes(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """In one L2 table, which is one cluster."""
        return self.cluster_size // self.l2_entry_bytes

    @property
    def l1_coverage(self) -> int:
        """Bytes of the disk that one L1 entry stands for."""
        return self.l2_entries << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def refcount_block_entries(self) -> int:
        return self.cluster_size * 8 >> self.refcount_order

    def extension(self, kind: ExtensionType) -> bytes | None:
        """The first extension of this type."""
        return next((e.data for e in self.extensions if e.type == kind), None)

    def with_extension(self, kind: ExtensionType, data: bytes | None) -> Header:
        """With this extension instead of those of its type; None: without any."""
        rest = tuple(e for e in self.extensions if e.type != kind)
        return attrs.evolve(
            self, extensions=rest if data is None else (*rest, Extension(kind, data))
        )

    @property
    def backing_format(self) -> str | None:
        """As written in the image: ``raw``, ``qcow2``..."""
        data = self.extension(ExtensionType.BACKING_FORMAT)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    @property
    def data_file(self) -> str | None:
        """The external data file's name."""
        data = self.extension(ExtensionType.DATA_FILE)
        return None if data is None else data.decode("utf-8", "surrogateescape")


def looks_like_qcow2(first: bytes) -> bool:
    """Whether an image that begins with these bytes claims to be qcow2 of a version known here."""
    return len(first) >= 8 and struct.unpack_from(">II", first) in (
        (layout.MAGIC, 2),
        (layout.MAGIC, 3),
    )


def parse_header(data: bytes) -> Header:
    """Take apart an image's first cluster (or more; less if the file is shorter).

    Checks all that can be seen without the rest of the image.  Raises `CorruptImage`.
    """
    if len(data) < V2_LENGTH:
        raise CorruptImage("the file is too short for a qcow2 header")
    (
        magic,
        version,
        backing_offset,
        backing_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters,
        nb_snapshots,
        snapshots_offset,
    ) = _V2.unpack_from(data)
    _require(magic == layout.MAGIC, "it is not a qcow2 image: it does not begin with QFI\\xfb")
    _require(version in (2, 3), f"qcow2 version {version} is not supported")
    incompatible = compatible = autoclear = 0
    refcount_order, header_length = 4, V2_LENGTH
    if version == 3:
        _require(len(data) >= V3_LENGTH, "the file is too short for a qcow2 header")
        incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(
            data, V2_LENGTH
        )
    _require(
        layout.MIN_CLUSTER_BITS <= cluster_bits <= layout.MAX_CLUSTER_BITS,
        f"clusters of 2^{cluster_bits} bytes are not supported (512 bytes to 2 MiB are)",
    )
    cluster_size = 1 << cluster_bits
    _require(
        (version == 2 or header_length >= V3_LENGTH) and header_length <= cluster_size,
        f"a header length of {header_length} bytes is impossible",
    )
    _require(len(data) >= header_length, "the file is too short for its header")
    first = data[:cluster_size]
    extensions = tuple(_parse_extensions(first, header_length, backing_offset))
    _require_known_features(incompatible, extensions)
    compression = CompressionType.ZLIB
    if header_length > V3_LENGTH:
        number = data[V3_LENGTH]
        _require(number in tuple(CompressionType), f"compression type {number} is not supported")
        compression = CompressionType(number)
    _require(
        (compression != CompressionType.ZLIB) == bool(incompatible & Incompatible.COMPRESSION_TYPE),
        "the compression type contradicts its feature bit",
    )
    _require(crypt_method in tuple(CryptMethod), f"crypt method {crypt_method} is not supported")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=CryptMethod(crypt_method),
        l1_size=l1_size,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        nb_snapshots=nb_snapshots,
        snapshots_offset=snapshots_offset,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        header_length=header_length,
        compression_type=compression,
        extensions=extensions,
        backing_file=_parse_backing(first, header_length, backing_offset, backing_size),
        unknown_tail=bytes(data[WITH_COMPRESSION_TYPE:header_length]),
    )
    _check_numbers(header)
    return header


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CorruptImage(problem)


def _check_numbers(header: Header) -> None:
    cluster = header.cluster_size
    _require(
        header.refcount_order <= layout.MAX_REFCOUNT_ORDER,
        f"refcounts of 2^{header.refcount_order} bits are impossible",
    )
    _require(header.size < 1 << 63, f"a disk of {header.size} bytes is impossible")
    if header.extended_l2:
        _require(header.cluster_bits >= 14, "extended L2 entries need clusters of 16 KiB or more")
    _require(
        header.l1_size * 8 <= layout.MAX_L1_BYTES,
        f"an L1 table of {header.l1_size} entries is larger than 32 MiB",
    )
    needed = -(-header.size // header.l1_coverage)
    _require(
        header.l1_size >= needed,
        f"the L1 table has {header.l1_size} entries, the disk needs {needed}",
    )
    _check_table(header, "L1", header.l1_table_offset, header.l1_size * 8)
    _require(header.refcount_table_clusters > 0, "it has no refcount table")
    refcount_table = header.refcount_table_clusters * cluster
    _require(
        refcount_table <= layout.MAX_REFCOUNT_TABLE_BYTES or header.refcount_table_clusters == 1,
        f"a refcount table of {refcount_table} bytes is larger than 8 MiB",
    )
    _check_table(header, "refcount", header.refcount_table_offset, refcount_table)
    _require(
        header.nb_snapshots <= layout.MAX_SNAPSHOTS,
        f"{header.nb_snapshots} snapshots are more than {layout.MAX_SNAPSHOTS}",
    )
    _check_table(header, "snapshot", header.snapshots_offset, header.nb_snapshots)
    if header.crypt_method == CryptMethod.LUKS:
        _require(
            len(header.extension(ExtensionType.ENCRYPTION) or b"") == 16,
            "it is encrypted, and says nowhere how",
        )


def _check_table(header: Header, what: str, offset: int, length: int) -> None:
    _require(
        offset % header.cluster_size == 0, f"the {what} table at {offset} begins inside a cluster"
    )
    _require(
        offset + length < 1 << 56 and (offset > 0 or length == 0),
        f"the {what} table can't be at {offset}",
    )


def _require_known_features(incompatible: int, extensions: tuple[Extension, ...]) -> None:
    unknown = incompatible & ~_KNOWN_INCOMPATIBLE
    if not unknown:
        return
    names = {}
    for extension in extensions:
        if extension.type == ExtensionType.FEATURE_NAMES:
            whole = len(extension.data) - len(extension.data) % _FEATURE.size
            for kind, bit, name in _FEATURE.iter_unpack(extension.data[:whole]):
                if kind == 0:
                    names[bit] = ascii(name.rstrip(b"\0").decode("ascii", "replace"))[1:-1]
    told = ", ".join(
        names.get(bit, f"incompatible feature bit {bit}") for bit in range(64) if unknown >> bit & 1
    )
    raise CorruptImage(f"it uses features that are not supported: {told}")


def _parse_extensions(first: bytes, start: int, backing_offset: int) -> Iterator[Extension]:
    # They end where the backing file's name begins, at the latest with the first cluster.
    end = min(backing_offset or len(first), len(first))
    at = start
    while at + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(first, at)
        at += _EXTENSION.size
        if kind == ExtensionType.END:
            return
        _require(length <= end - at, f"header extension {kind:#x} reaches beyond the header")
        yield Extension(kind, bytes(first[at : at + length]))
        at += length + -length % 8


def _parse_backing(first: bytes, start: int, offset: int, length: int) -> str | None:
    _require(offset <= len(first), "the backing file's name lies outside the first cluster")
    if not offset or not length:
        return None
    _require(length <= layout.MAX_BACKING_NAME_BYTES, f"a backing file's name of {length} bytes")
    _require(
        start <= offset and offset + length <= len(first),
        "the backing file's name lies outside the first cluster",
    )
    return first[offset : offset + length].decode("utf-8", "surrogateescape")


def pack_header(header: Header) -> bytes:
    """The first cluster's bytes up to the end of the backing file's name.

    Raises `CorruptImage` if they are more than a cluster.
    """
    backing = (header.backing_file or "").encode("utf-8", "surrogateescape")
    tail = b"".join(
        _EXTENSION.pack(e.type, len(e.data)) + e.data + bytes(-len(e.data) % 8)
        for e in header.extensions
    ) + _EXTENSION.pack(ExtensionType.END, 0)
    length = V2_LENGTH
    v3 = b""
    if header.version == 3:
        known = V3_LENGTH if header.header_length == V3_LENGTH else WITH_COMPRESSION_TYPE
        length = known + len(header.unknown_tail)
        v3 = _V3.pack(
            header.incompatible, header.compatible, header.autoclear, header.refcount_order, length
        )
        if known == WITH_COMPRESSION_TYPE:
            v3 += bytes((header.compression_type,)) + bytes(7)
        v3 += header.unknown_tail
    backing_offset = length + len(tail) if backing else 0
    packed = (
        _V2.pack(
            layout.MAGIC,
            header.version,
            backing_offset,
            len(backing),
            header.cluster_bits,
            header.size,
            header.crypt_method,
            header.l1_size,
            header.l1_table_offset,
            header.refcount_table_offset,
            header.refcount_table_clusters,
            header.nb_snapshots,
            header.snapshots_offset,
        )
        + v3
        + tail
        + backing
    )
    if len(packed) > header.cluster_size:
        raise CorruptImage(
            f"the header with the backing file's name ({len(packed)} bytes) does not fit into a "
            f"cluster of {header.cluster_size}"
        )
    return packed


def feature_names() -> Extension:
    """The feature name table, for new images of version 3."""
    data = b"".join(_FEATURE.pack(*feature) for feature in FEATURE_NAMES)
    return Extension(ExtensionType.FEATURE_NAMES, data)


__all__ = [
    "Autoclear",
    "Compatible",
    "Extension",
    "Header",
    "feature_names",
    "looks_like_qcow2",
    "pack_header",
    "parse_header",
]
