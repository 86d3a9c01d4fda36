"""qcow2 images, as QEMU has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbd.core.driver import (
    API_VERSION,
    BlockDevice,
    Capability,
    Concurrency,
    DriverDescriptor,
    ImageFormat,
    OpenContext,
    ProbeScore,
)
from xbd.drivers.qcow2.header import looks_like_qcow2
from xbd.drivers.qcow2.options import Qcow2Options

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager


def _image_format() -> ImageFormat:
    from xbd.drivers.qcow2.format import Qcow2Format

    return Qcow2Format()


def _open(context: OpenContext, options: Qcow2Options) -> AbstractAsyncContextManager[BlockDevice]:
    from xbd.drivers.qcow2.device import open_qcow2

    return open_qcow2(context, options)


def _probe(first: bytes) -> ProbeScore:
    return ProbeScore.MAGIC if looks_like_qcow2(first) else ProbeScore.NO


DRIVER = DriverDescriptor(
    name="qcow2",
    summary="qcow2 images: snapshots, backing files, compression, encryption",
    api_version=API_VERSION,
    options=Qcow2Options,
    concurrency=Concurrency.PARALLEL,
    capabilities=(
        Capability.WRITE
        | Capability.FLUSH
        | Capability.DISCARD
        | Capability.WRITE_ZEROES
        | Capability.RESIZE
        | Capability.SNAPSHOT
    ),
    open=_open,
    probe=_probe,
    image_format=_image_format,
)
"""The entry point."""
