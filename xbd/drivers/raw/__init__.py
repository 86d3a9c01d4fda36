"""Host block devices: disks, partitions, logical volumes, loop devices."""

from __future__ import annotations

from xbd.core.driver import API_VERSION, Capability, Concurrency, DriverDescriptor
from xbd.drivers.raw.device import open_raw
from xbd.drivers.raw.options import RawOptions

DRIVER = DriverDescriptor(
    name="raw",
    summary="host block devices (disks, partitions, volumes)",
    api_version=API_VERSION,
    options=RawOptions,
    concurrency=Concurrency.PARALLEL,
    capabilities=(
        Capability.WRITE
        | Capability.FLUSH
        | Capability.DISCARD
        | Capability.WRITE_ZEROES
        | Capability.RESIZE
    ),
    open=open_raw,
)
"""The entry point."""
