"""What can be said about a new image, and what of it does not go together.

Names and defaults are those of ``qemu-img create -f qcow2 -o``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from xbd.core.driver import (
    ConfigError,
    absolute_path,
    boolean,
    choice,
    option,
    positive_int,
    size,
    text,
)
from xbd.core.units import KIB
from xbd.drivers.qcow2 import layout

SMALLEST_EXTENDED_CLUSTER: Final = 16 * KIB

OFF: Final = "off"
METADATA: Final = "metadata"
FALLOC: Final = "falloc"
FULL: Final = "full"


@attrs.frozen(kw_only=True)
class CreateOptions:
    """``-o NAME=VALUE`` of ``xbd image create qcow2:...``."""

    cluster_size: int = option(
        size, default=64 * KIB, help="a power of two from 512 to 2M: the unit of allocation"
    )
    compat: str = option(
        choice("0.10", "1.1", "v2", "v3"),
        default="1.1",
        help="the format's version: 0.10 (v2) for QEMU before 1.1, else 1.1 (v3)",
    )
    preallocation: str = option(
        choice(OFF, METADATA, FALLOC, FULL),
        default=OFF,
        help="off: the image grows as it is written; metadata: the tables are complete; falloc: "
        "the data's space is reserved too; full: it is written with zeroes",
    )
    refcount_bits: int = option(
        positive_int, default=16, help="a power of two up to 64: width of a cluster's use count"
    )
    lazy_refcounts: bool = option(
        boolean, default=False, help="QEMU may write use counts later than data"
    )
    extended_l2: bool = option(
        boolean, default=False, help="clusters are allocated in 32 parts; for large clusters"
    )
    compression_type: str = option(
        choice("zlib", "zstd"), default="zlib", help="how compressed clusters are compressed"
    )
    data_file: str | None = option(
        text,
        default=None,
        help="data goes to this new file; absolute, or relative to the image's directory",
    )
    data_file_raw: bool = option(
        boolean, default=False, help="the data file is at all times a flat image by itself"
    )
    encrypt_format: str | None = option(choice("luks"), default=None, help="encrypt the data")
    encrypt_key_file: Path | None = option(
        absolute_path, default=None, help="the file whose whole content is the passphrase"
    )
    encrypt_cipher_alg: str = option(
        choice("aes-128", "aes-256"), default="aes-256", help="how long the keys are"
    )
    encrypt_cipher_mode: str = option(choice("xts", "cbc"), default="xts", help="the cipher's mode")
    encrypt_ivgen_alg: str = option(
        choice("plain64", "plain", "essiv"),
        default="plain64",
        help="how sectors' initialization vectors are made (essiv: with sha256)",
    )
    encrypt_hash_alg: str = option(
        choice("sha256", "sha1", "sha224", "sha384", "sha512"),
        default="sha256",
        help="the hash under the passphrase's PBKDF2",
    )

    @property
    def version(self) -> int:
        return 2 if self.compat in ("0.10", "v2") else 3


def check_options(options: CreateOptions, *, backing: bool) -> None:
    """Raise a `ConfigError` that tells of all that is impossible, in one line."""
    problems = [
        *_bad_numbers(options),
        *_not_in_version_2(options),
        *_contradictions(options, backing=backing),
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def _bad_numbers(options: CreateOptions) -> Iterator[str]:
    cluster = options.cluster_size
    if not _is_power(cluster, 1 << layout.MIN_CLUSTER_BITS, 1 << layout.MAX_CLUSTER_BITS):
        yield f"cluster-size: {cluster} is not a power of two from 512 to 2M"
    elif options.extended_l2 and cluster < SMALLEST_EXTENDED_CLUSTER:
        yield f"extended-l2 needs a cluster-size of 16K or more, not {cluster}"
    if not _is_power(options.refcount_bits, 1, 1 << layout.MAX_REFCOUNT_ORDER):
        yield f"refcount-bits: {options.refcount_bits} is not a power of two from 1 to 64"


def _is_power(number: int, smallest: int, largest: int) -> bool:
    return smallest <= number <= largest and not number & (number - 1)


def _not_in_version_2(options: CreateOptions) -> Iterator[str]:
    if options.version != 2:
        return
    needs = {
        "refcount-bits other than 16": options.refcount_bits != 16,
        "lazy-refcounts": options.lazy_refcounts,
        "extended-l2": options.extended_l2,
        "compression-type=zstd": options.compression_type == "zstd",
        "data-file": options.data_file is not None,
        "preallocation of an encrypted image": options.encrypt_format is not None
        and options.preallocation != OFF,
    }
    for what, wanted in needs.items():
        if wanted:
            yield f"{what} needs compat=1.1"


def _contradictions(options: CreateOptions, *, backing: bool) -> Iterator[str]:
    if options.data_file_raw and options.data_file is None:
        yield "data-file-raw needs data-file"
    if backing and options.data_file_raw:
        yield "a data file that is a flat image by itself (data-file-raw) can't have a backing file"
    if backing and options.preallocation != OFF and not options.extended_l2:
        yield "with a backing file, preallocation needs extended-l2"
    if options.encrypt_format is not None and options.encrypt_key_file is None:
        yield "encrypt-format needs encrypt-key-file"
    if options.encrypt_key_file is not None and options.encrypt_format is None:
        yield "encrypt-key-file needs encrypt-format=luks"
    if options.encrypt_format is not None and options.data_file_raw:
        yield "an encrypted data file is no flat image: leave out data-file-raw"
