"""Making images.

A new image gets its header last, when everything else is durable: until then, and for ever if the
host dies meanwhile, the file is no image.

Source: QEMU's docs/interop/qcow2.rst.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs

from xbd.core.driver import Backing, ConfigError, Progress
from xbd.core.driver.image import no_progress
from xbd.core.hostio.newfile import fill, new_file, reserve
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.chain import FORMATS
from xbd.drivers.qcow2.confined import named_path
from xbd.drivers.qcow2.create_options import (
    FALLOC,
    FULL,
    METADATA,
    OFF,
    CreateOptions,
    check_options,
)
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import (
    V2_LENGTH,
    WITH_COMPRESSION_TYPE,
    Extension,
    Header,
    feature_names,
    pack_header,
)
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import (
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    ExtensionType,
    Incompatible,
)
from xbd.drivers.qcow2.luks import NewLuks, create_luks, pack_crypto_area
from xbd.drivers.qcow2.luks_cipher import CipherSpec
from xbd.drivers.qcow2.new_layout import (
    NewLayout,
    l1_entries,
    l1_table,
    l2_tables,
    plan,
    refcount_blocks,
    refcount_table,
)
from xbd.drivers.qcow2.offline import opened_file, read_header
from xbd.drivers.qcow2.secrets import read_secret

_WITH_FEATURE_NAMES: Final = 4096
"""Smaller clusters keep their room for a backing file's name."""


def create(
    path: Path,
    size: int | None,
    options: CreateOptions,
    *,
    backing: Backing | None = None,
    progress: Progress = no_progress,
) -> None:
    """Make an image: see `ImageFormat.create`."""
    check_options(options, backing=backing is not None)
    if backing is not None:
        behind = backing_size(path, backing)
        size = behind if size is None else size
    if size is None:
        raise ConfigError("an image without a backing file needs a size")
    if options.data_file_raw and options.preallocation == OFF:
        # What is not mapped reads as zeroes, whatever the data file says of it.
        options = attrs.evolve(options, preallocation=METADATA)
    luks = _luks(options)
    header = _header(size + -size % layout.SECTOR, options, backing)
    new = plan(
        header,
        luks_bytes=0 if luks is None else luks.length,
        preallocated=options.preallocation != OFF,
        data_here=options.data_file is None,
    )
    header = _placed(header, new, luks)
    packed = _pack(header)
    with ExitStack() as stack:
        stack.enter_context(new_file(path))
        host = stack.enter_context(opened_file(path, writable=True))
        data_host = host
        if options.data_file is not None:
            data_path = named_path(options.data_file, path.parent, "the data file")
            stack.enter_context(new_file(data_path))
            data_host = stack.enter_context(opened_file(data_path, writable=True))
        if luks is not None:
            host.write(new.luks_at * new.cluster_size, luks.start)
        _Writing(host, data_host, header, new, progress).write_all(options.preallocation)
        host.write(0, packed)


def backing_size(path: Path, backing: Backing) -> int:
    """Bytes of the disk that lies behind an image at `path`, in whole sectors.

    Raises `ConfigError` for what can't be a backing file, `DriverError` if it can't be read.
    """
    if backing.format not in FORMATS:
        raise ConfigError(
            f"a qcow2 image can't have a backing file of the format {backing.format!r}, only "
            f"{' or '.join(FORMATS)}"
        )
    behind = named_path(backing.file, path.parent, "the backing file")
    with opened_file(behind, writable=False) as host:
        size = read_header(host).size if backing.format == "qcow2" else host.size()
    return size + -size % layout.SECTOR


def _header(size: int, options: CreateOptions, backing: Backing | None) -> Header:
    """Everything but what depends on where things are."""
    incompatible = Incompatible(0)
    if options.data_file is not None:
        incompatible |= Incompatible.EXTERNAL_DATA_FILE
    if options.compression_type != "zlib":
        incompatible |= Incompatible.COMPRESSION_TYPE
    if options.extended_l2:
        incompatible |= Incompatible.EXTENDED_L2
    extensions = []
    if backing is not None:
        extensions.append(Extension(ExtensionType.BACKING_FORMAT, backing.format.encode()))
    if options.data_file is not None:
        name = options.data_file.encode("utf-8", "surrogateescape")
        extensions.append(Extension(ExtensionType.DATA_FILE, name))
    if options.version >= 3 and options.cluster_size >= _WITH_FEATURE_NAMES:
        extensions.append(feature_names())
    return Header(
        version=options.version,
        cluster_bits=options.cluster_size.bit_length() - 1,
        size=size,
        incompatible=incompatible,
        compatible=Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=Autoclear.RAW_EXTERNAL_DATA if options.data_file_raw else 0,
        refcount_order=options.refcount_bits.bit_length() - 1,
        header_length=V2_LENGTH if options.version == 2 else WITH_COMPRESSION_TYPE,
        compression_type=CompressionType[options.compression_type.upper()],
        extensions=tuple(extensions),
        backing_file=None if backing is None else backing.file,
    )


def _luks(options: CreateOptions) -> NewLuks | None:
    if options.encrypt_format is None:
        return None
    secret = read_secret(options.encrypt_key_file, None)
    assert secret is not None
    bits = int(options.encrypt_cipher_alg.removeprefix("aes-"))
    iv = options.encrypt_ivgen_alg
    spec = CipherSpec(
        mode=options.encrypt_cipher_mode,
        iv="essiv:sha256" if iv == "essiv" else iv,
        key_bytes=bits // 8 * (2 if options.encrypt_cipher_mode == "xts" else 1),
    )
    return create_luks(secret, spec=spec, hash_spec=options.encrypt_hash_alg)


def _placed(header: Header, new: NewLayout, luks: NewLuks | None) -> Header:
    header = attrs.evolve(
        header,
        refcount_table_offset=new.refcount_table_at * new.cluster_size,
        refcount_table_clusters=new.refcount_table,
        l1_table_offset=new.l1_at * new.cluster_size,
        l1_size=l1_entries(header),
    )
    if luks is None:
        return header
    area = pack_crypto_area(new.luks_at * new.cluster_size, luks.length)
    return attrs.evolve(header, crypt_method=CryptMethod.LUKS).with_extension(
        ExtensionType.ENCRYPTION, area
    )


def _pack(header: Header) -> bytes:
    if len((header.backing_file or "").encode("utf-8", "surrogateescape")) > (
        layout.MAX_BACKING_NAME_BYTES
    ):
        raise ConfigError(
            f"the backing file's name has more than {layout.MAX_BACKING_NAME_BYTES} bytes"
        )
    try:
        return pack_header(header)
    except CorruptImage as error:
        raise ConfigError(f"{error}: choose a shorter name or a larger cluster-size") from error


class _Writing:
    """Writes everything but the header, and makes it durable."""

    def __init__(
        self, host: Host, data_host: Host, header: Header, new: NewLayout, progress: Progress
    ) -> None:
        self._host = host
        self._data_host = data_host
        self._header = header
        self._new = new
        self._progress = progress
        self._done = 0
        self._total = 0

    def write_all(self, preallocation: str) -> None:
        """With the data clusters that `preallocation` demands."""
        new, header = self._new, self._header
        data_here = self._data_host is self._host
        first_data = new.data_at * new.cluster_size if data_here else 0
        clusters = -(-header.size // new.cluster_size) if preallocation != OFF else 0
        data_bytes = clusters * new.cluster_size if data_here else header.size
        self._total = new.data_at * new.cluster_size
        self._host.truncate(new.end * new.cluster_size)
        if not data_here:
            self._data_host.truncate(header.size)
        if preallocation in (FALLOC, FULL):
            self._total += data_bytes
            allocate = reserve if preallocation == FALLOC else fill
            allocate(self._data_host.path, self._data_host.fd, first_data, data_bytes, self._step)
        self._write(refcount_table(new))
        self._write(refcount_blocks(new, header.refcount_order))
        self._write(l1_table(new))
        self._write(
            l2_tables(
                new,
                first_data,
                clusters,
                extended=header.extended_l2,
                # Zeroes in the file are no zeroes once they are decrypted.
                zero=header.crypt_method is not CryptMethod.NONE,
            )
        )
        self._host.flush()
        self._data_host.flush()
        self._step(self._total - self._done)

    def _write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        for offset, data in pieces:
            self._host.write(offset, data)
            self._step(len(data))

    def _step(self, length: int) -> None:
        self._done += length
        self._progress(self._done, self._total)
