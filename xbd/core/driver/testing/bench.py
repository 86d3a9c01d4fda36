"""What the checks of the conformance suite work with."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import attrs

from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.api import Capability, Concurrency, HostExtent, ReadRequest, WriteRequest
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.driver.geometry import request_unit
from xbd.core.driver.open import DeviceMaker, open_device
from xbd.core.units import KIB, MIB

SMALLEST_DISK: Final = 64 * KIB
"""Bytes that a disk under test must have."""

LARGEST_SPAN: Final = MIB
"""Most of the checks use no more of the disk than this, from its start."""


@attrs.define
class Bench:
    """Opens the disk under test as often as a check likes."""

    make: DeviceMaker
    concurrency: Concurrency
    make_full: DeviceMaker | None = None
    volatile: bool = False
    examples: int = 50

    @asynccontextmanager
    async def open(
        self, *, writable: bool = True, make: DeviceMaker | None = None
    ) -> AsyncIterator[DeviceAccess]:
        """The disk, opened; afterwards no bug may have shown."""
        opening = open_device(
            make or self.make,
            name="the disk under test",
            concurrency=self.concurrency,
            device_id="conformance",
            writable=writable,
        )
        async with opening as access:
            yield access
        assert access.bugs == 0, "the driver raised what no driver may raise; see the log"


def span(access: DeviceAccess) -> int:
    """Bytes from the disk's start on which checks may work: whole units."""
    size = min(access.geometry.size, LARGEST_SPAN)
    return size - size % request_unit(access.geometry)


def can(access: DeviceAccess, capability: Capability) -> bool:
    """Whether the opened device has it."""
    return capability in access.capabilities


def noise(length: int, seed: int) -> bytes:
    """Bytes that don't repeat, the same for the same seed."""
    return random.Random(seed).randbytes(length)


async def read(access: DeviceAccess, offset: int, length: int) -> bytes:
    """A range of the disk."""
    target = bytearray(length)
    await access.readv(offset, [memoryview(target)])
    return bytes(target)


async def write(access: DeviceAccess, offset: int, data: bytes) -> None:
    """Write a range of the disk from a buffer that is scribbled over afterwards."""
    buffer = bytearray(data)
    await access.writev(offset, [memoryview(buffer)])
    buffer[:] = b"\xaa" * len(buffer)


async def write_in_parts(access: DeviceAccess, offset: int, data: bytes, *, part: int) -> None:
    """As `write`, by as many requests at a time, in another order than the disk's."""
    places = range(0, len(data), part)
    sizes = [min(part, len(data) - at) for at in places]
    if not all(map(access.takes_with_others, (offset + at for at in places), sizes)):
        await write(access, offset, data)
        return
    requests = []
    for at, size in sorted(zip(places, sizes, strict=True), key=lambda each: -each[0] % 7):
        buffer = _host_buffer(access, size)
        buffer[:] = data[at : at + size]
        requests.append(WriteRequest(offset + at, [buffer]))
    await access.write_many(requests)
    for request in requests:
        assert request.error is None, f"one of many requests failed: {request.error}"
        for view in request.buffers:
            view[:] = b"\xaa" * len(view)


async def read_in_parts(access: DeviceAccess, offset: int, length: int, *, part: int) -> bytes:
    """As `read`, by as many requests at a time."""
    places = range(0, length, part)
    sizes = [min(part, length - at) for at in places]
    if not all(map(access.takes_with_others, (offset + at for at in places), sizes)):
        return await read(access, offset, length)
    requests = [
        ReadRequest(offset + at, [_host_buffer(access, size)])
        for at, size in zip(places, sizes, strict=True)
    ]
    await access.read_many(requests)
    for request in requests:
        assert request.error is None, f"one of many requests failed: {request.error}"
    return b"".join(bytes(request.buffers[0]) for request in requests)


def read_host(access: DeviceAccess, extents: Sequence[HostExtent], length: int) -> bytes:
    """What lies in the host files, read as the data path would: aligned for O_DIRECT."""
    parts = []
    for extent in extents:
        size = min(extent.length, length)
        buffer = _host_buffer(access, size)
        got = os.preadv(extent.fd, [buffer], extent.offset) if size else 0
        assert got == size, f"{extent} is {size - got} bytes short in the host's file"
        parts.append(bytes(buffer))
        length -= size
    return b"".join(parts)


def write_host(access: DeviceAccess, extents: Sequence[HostExtent], data: bytes) -> None:
    """Write to the host files as the data path would."""
    for extent in extents:
        buffer = _host_buffer(access, min(extent.length, len(data)))
        buffer[:] = data[: len(buffer)]
        if buffer:
            assert os.pwritev(extent.fd, [buffer], extent.offset) == len(buffer)
        data = data[len(buffer) :]


def _host_buffer(access: DeviceAccess, length: int) -> memoryview:
    return aligned_buffer(length, max(access.geometry.memory_alignment, 4096))
