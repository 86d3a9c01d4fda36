"""Places for what lies nowhere yet: the layer over drivers, and the manual's example."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from manuals_driver import chunks_with

from xbd.core.driver import Concurrency, Extent, MediaError, Unsupported
from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.testing import MemoryDevice, check_block_device
from xbd.core.driver.testing.bench import Bench, read
from xbd.core.errors import DeviceBroken, DriverError

SIZE = 1 << 20


class Placing(MemoryDevice):
    error: Exception | None = None
    asked = 0

    def can_place(self, offset: int, length: int) -> bool:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return True

    async def place(self, extents: Sequence[Extent]) -> None:
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def opened(*, writable: bool = True) -> AsyncIterator[tuple[Placing, DeviceAccess]]:
    device = Placing(SIZE, writable=writable)
    access = DeviceAccess(
        device, device_id="disk", concurrency=Concurrency.PARALLEL, writable=writable
    )
    yield device, access
    await access.aclose()


SOME = [Extent(offset=0, length=512), Extent(offset=8192, length=1)]


async def test_what_may_be_written_may_be_placed() -> None:
    async with opened() as (_, access):
        assert access.can_place(0, 512)
        await access.place(SOME)
    assert not access.can_place(0, 512)
    with pytest.raises(DeviceBroken):
        await access.place(SOME)


async def test_nobody_asks_a_disk_that_is_not_written_to() -> None:
    async with opened(writable=False) as (device, access):
        assert not access.can_place(0, 512)
        assert not device.asked
        with pytest.raises(Unsupported):
            await access.place(SOME)


async def test_nobody_asks_a_condemned_disk() -> None:
    async with opened() as (device, access):
        access.condemn("for a test")
        assert not access.can_place(0, 512)
        assert not device.asked
        with pytest.raises(DeviceBroken, match="for a test"):
            await access.place(SOME)


async def test_places_are_inside_the_disk() -> None:
    async with opened() as (_, access):
        with pytest.raises(DriverError, match="outside the disk"):
            await access.place([*SOME, Extent(offset=SIZE - 512, length=513)])


async def test_errors_are_told_and_bugs_counted() -> None:
    async with opened() as (device, access):
        device.error = MediaError("no")
        with pytest.raises(MediaError, match="no"):
            await access.place(SOME)
        assert not access.bugs
        device.error = RuntimeError("what?")
        assert not access.can_place(0, 512)
        assert access.bugs == 1
        with pytest.raises(DriverError, match="bug in the driver"):
            await access.place(SOME)
        assert access.bugs == 2


async def test_the_manuals_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_with(monkeypatch, "place", "can_place", "place")
    options = chunks.Options(path=tmp_path, size=(3 << 20) + 512)
    bench = Bench(lambda context: chunks.open_chunks(context, options), chunks.DRIVER.concurrency)
    async with bench.open() as access:
        last = Extent(offset=options.size - 512, length=512)
        assert access.can_place(last.offset, last.length)
        await access.place([Extent(offset=chunks.CHUNK - 1, length=2), last])
        assert not access.can_place(last.offset, last.length)
        known = [
            access.resolve(number * chunks.CHUNK, 512, for_write=True) is not None
            for number in range(4)
        ]
        assert known == [True, True, False, True]
        assert await read(access, 0, options.size) == bytes(options.size)
    make = partial(chunks.open_chunks, options=options)
    await check_block_device(make, concurrency=chunks.DRIVER.concurrency)
