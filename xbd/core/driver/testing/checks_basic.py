"""Checks of what a device says about itself, and that each operation does what it is for."""

from __future__ import annotations

import fcntl
import os
from typing import Final

import trio

from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.api import BlockDevice, Capability, Extent
from xbd.core.driver.geometry import request_unit
from xbd.core.driver.testing.bench import (
    SMALLEST_DISK,
    Bench,
    can,
    noise,
    read,
    read_host,
    span,
    write,
)
from xbd.core.errors import Unsupported

_METHODS: Final = {
    Capability.WRITE: "writev",
    Capability.FLUSH: "flush",
    Capability.DISCARD: "discard",
    Capability.WRITE_ZEROES: "write_zeroes",
    Capability.RESIZE: "resize",
    Capability.SNAPSHOT: "create_snapshot",
}


async def check_promises(bench: Bench) -> None:
    """Geometry and capabilities make sense, and stay as they are."""
    async with bench.open() as access:
        device, geometry = access.device, access.geometry
        assert geometry.size >= SMALLEST_DISK, f"test with a disk of {SMALLEST_DISK} bytes or more"
        for capability, method in _METHODS.items():
            overridden = getattr(type(device), method) is not getattr(BlockDevice, method)
            assert overridden or capability not in device.capabilities, (
                f"{capability} is claimed, but {method} is not implemented"
            )
        assert Capability.WRITE in device.capabilities or not device.capabilities & (
            Capability.DISCARD | Capability.WRITE_ZEROES | Capability.RESIZE | Capability.SNAPSHOT
        ), "what changes the disk is claimed without WRITE"
        await read(access, 0, geometry.logical_block)
        assert device.geometry == geometry, "the geometry changed without a resize"
        assert device.capabilities & access.capabilities == access.capabilities


async def check_reading(bench: Bench) -> None:
    """Any range can be read, into any buffers, and is the same each time."""
    async with bench.open() as access:
        size, unit = span(access), request_unit(access.geometry)
        whole = await read(access, 0, size)
        for start, length in ((0, unit), (unit, 3 * unit), (1, 1), (unit - 1, 2), (7, 5000)):
            assert await read(access, start, length) == whole[start : start + length]
        end = access.geometry.size
        tail = await read(access, end - 2 * unit, 2 * unit)
        assert await read(access, end - 1, 1) == tail[-1:]
        buffers = [memoryview(bytearray(512)) for _ in range(64)]
        await access.readv(0, buffers)
        assert b"".join(buffers) == whole[: 64 * 512], "scattered reading differs"


async def check_writing(bench: Bench) -> None:
    """What was written is read: small, long, scattered, at the very end, not aligned."""
    async with bench.open() as access:
        if not can(access, Capability.WRITE):
            return
        size, end, unit = span(access), access.geometry.size, request_unit(access.geometry)
        model = bytearray(noise(size, 1))
        await write(access, 0, bytes(model))
        changes = ((0, unit), (unit, 5 * unit), (3, 7), (unit - 1, unit + 2), (size - 9, 9))
        for seed, (start, length) in enumerate(changes):
            data = noise(length, seed)
            await write(access, start, data)
            model[start : start + length] = data
        pieces = [memoryview(noise(512, seed)) for seed in range(min(1100, size // 512))]
        await access.writev(0, pieces)
        model[: 512 * len(pieces)] = b"".join(pieces)
        assert await read(access, 0, size) == model
        before = await read(access, end - 2 * unit, unit)
        await write(access, end - unit, noise(unit, 9))
        assert await read(access, end - 2 * unit, 2 * unit) == before + noise(unit, 9)
        await access.flush()


async def check_zeroes(bench: Bench) -> None:
    """write_zeroes gives zeroes, whether space may be freed or not, and nothing else changes."""
    async with bench.open() as access:
        if not can(access, Capability.WRITE):
            return
        size, unit = span(access), request_unit(access.geometry)
        for may_unmap in (False, True):
            model = bytearray(noise(size, 2))
            await write(access, 0, bytes(model))
            for start, length in ((0, unit), (3 * unit, size // 2), (size - unit, unit), (5, 3)):
                await access.write_zeroes(start, length, may_unmap=may_unmap)
                model[start : start + length] = bytes(length)
            assert await read(access, 0, size) == model
            await write(access, 0, noise(size, 3))
            assert await read(access, 0, size) == noise(size, 3), "writing over zeroes failed"


async def check_discard(bench: Bench) -> None:
    """Discarding changes nothing outside the extents, and they can be written again."""
    async with bench.open() as access:
        if not can(access, Capability.DISCARD):
            return
        size, unit = span(access), request_unit(access.geometry)
        data = noise(size, 4)
        await write(access, 0, data)
        quarter = size // 4 - size // 4 % unit
        await access.discard(
            [Extent(offset=quarter, length=unit), Extent(offset=2 * quarter, length=quarter)]
        )
        assert await read(access, 0, quarter) == data[:quarter]
        between = slice(quarter + unit, 2 * quarter)
        assert await read(access, between.start, between.stop - between.start) == data[between]
        assert await read(access, 3 * quarter, size - 3 * quarter) == data[3 * quarter :]
        await write(access, quarter, data[quarter : 3 * quarter])
        assert await read(access, 0, size) == data


async def check_block_status(bench: Bench) -> None:
    """What is told of holes and zeroes is true, before and after changes, up to the disk's end."""
    async with bench.open() as access:
        size, unit = span(access), request_unit(access.geometry)
        await _check_status(access)
        if not can(access, Capability.WRITE):
            return
        third = size // 3 - size // 3 % unit
        await write(access, 0, noise(size, 11))
        await access.write_zeroes(0, third, may_unmap=True)
        if can(access, Capability.DISCARD):
            await access.discard([Extent(offset=third, length=third)])
        await _check_status(access)
        await write(access, unit, noise(unit, 12))
        await write(access, third, noise(unit, 13))
        await _check_status(access)
    async with bench.open(writable=False) as access:
        await _check_status(access)


async def _check_status(access: DeviceAccess) -> None:
    """Ask in pieces and at once, at both ends of the disk, and read what is said to be zero."""
    size, unit, end = span(access), request_unit(access.geometry), access.geometry.size
    tail = max(end - size - (end - size) % unit, 0)
    for start, stop, step in ((0, size, size // 5), (0, size, size), (tail, end, size)):
        step = max(step - step % unit, unit)
        while start < stop:
            length = min(step, stop - start)
            told = await access.device.block_status(start, length)
            assert told, f"nothing is told of byte {start}"
            assert all(status.length > 0 for status in told), "an empty range is told of"
            assert start + sum(status.length for status in told) <= end, (
                "block_status tells of more than the disk has"
            )
            at = start
            for status in told:
                if status.zero:
                    content = await read(access, at, min(status.length, size))
                    assert not any(content), f"zeroes are told at {at} where there are none"
                at += status.length
            start += length


async def check_resize(bench: Bench) -> None:
    """A device grows and shrinks; what remains is unchanged."""
    async with bench.open() as access:
        if not can(access, Capability.RESIZE):
            return
        size, old = span(access), access.geometry.size
        step = max(request_unit(access.geometry), 1 << 20)
        await write(access, 0, noise(size, 5))
        await access.resize(old + step)
        assert access.geometry.size == old + step == access.device.geometry.size
        await write(access, old, noise(step, 6))
        assert await read(access, old, step) == noise(step, 6)
        try:
            await access.resize(old)
        except Unsupported:
            pass  # many can only grow
        else:
            assert access.geometry.size == old
        assert await read(access, 0, size) == noise(size, 5)


async def check_snapshots(bench: Bench) -> None:
    """A snapshot changes nothing that is read, and everything can be written after it."""
    async with bench.open() as access:
        if not can(access, Capability.SNAPSHOT):
            return
        size, unit = span(access), request_unit(access.geometry)
        model = bytearray(noise(size, 14))
        await write(access, 0, bytes(model))
        for seed in (15, 16):
            await access.create_snapshot(f"check {seed}")
            assert await read(access, 0, size) == model, "a snapshot changed the disk"
            for start, length in ((unit, unit), (size // 2, 3), (size - 5 * unit, 5 * unit)):
                data = noise(length, seed)
                await write(access, start, data)
                model[start : start + length] = data
            await access.write_zeroes(0, unit)
            model[:unit] = bytes(unit)
            assert await read(access, 0, size) == model, "writing after a snapshot failed"


async def check_reopening(bench: Bench) -> None:
    """Content is there again after closing and opening, with and without a flush."""
    if bench.volatile:
        return
    for seed, flush in ((7, True), (8, False)):
        async with bench.open() as access:
            if not can(access, Capability.WRITE):
                return
            size = span(access)
            await write(access, 0, noise(size, seed))
            if flush:
                await access.flush()
        async with bench.open() as access:
            assert await read(access, 0, size) == noise(size, seed), "content was lost"


async def check_read_only(bench: Bench) -> None:
    """Opened read-only, a device claims nothing else, and resolves to read-only files."""
    async with bench.open(writable=False) as access:
        allowed = Capability.FLUSH
        assert not access.device.capabilities & ~allowed, (
            f"opened read-only, but claims {access.device.capabilities & ~allowed}"
        )
        unit = request_unit(access.geometry)
        content = await read(access, 0, unit)
        assert access.device.resolve(0, unit, for_write=True) is None
        extents = access.device.resolve(0, unit, for_write=False)
        if extents:
            assert read_host(access, extents, unit) == content[: sum(e.length for e in extents)]
            for extent in extents:
                assert not _writable(extent.fd), "opened read-only, but resolves to a writable fd"


async def check_closing(bench: Bench) -> None:
    """aclose can be called twice, and works when cancelled."""
    async with bench.open() as access:
        await access.device.aclose()
        await access.device.aclose()
    async with bench.open() as access:
        with trio.CancelScope() as scope:
            scope.cancel()
            await access.aclose()
    await _still_works(bench)


async def _still_works(bench: Bench) -> None:
    async with bench.open() as access:
        await read(access, 0, span(access))


def _writable(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
