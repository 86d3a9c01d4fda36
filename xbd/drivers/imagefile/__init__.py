"""Flat image files: the file's bytes are the disk's bytes, as vnd(4) has it."""

from __future__ import annotations

from xbd.core.driver import API_VERSION, Capability, Concurrency, DriverDescriptor, ImageFormat
from xbd.drivers.imagefile.device import open_imagefile
from xbd.drivers.imagefile.options import ImagefileOptions


def _image_format() -> ImageFormat:
    # A daemon has no use for it.
    from xbd.drivers.imagefile.format import ImagefileFormat

    return ImagefileFormat()


DRIVER = DriverDescriptor(
    name="imagefile",
    summary="flat image files (sparse or not)",
    api_version=API_VERSION,
    options=ImagefileOptions,
    concurrency=Concurrency.PARALLEL,
    capabilities=(
        Capability.WRITE
        | Capability.FLUSH
        | Capability.DISCARD
        | Capability.WRITE_ZEROES
        | Capability.RESIZE
    ),
    open=open_imagefile,
    image_format=_image_format,
)
"""The entry point."""
