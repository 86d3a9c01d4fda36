"""Requests that come together and go to the driver together."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from data_paths import NATIVE, NATIVE_PREADV, PYTHON

from xbd.core.datapath import GrantMode
from xbd.core.driver import Geometry, MediaError
from xbd.core.driver.testing import MemoryDevice
from xbd.core.errors import DeviceBroken
from xbd.core.frontend.errors import RequestFailed
from xbd.core.units import MIB, PAGE_SIZE

every_path = pytest.mark.parametrize(
    "native_threads", [PYTHON, NATIVE, NATIVE_PREADV], indirect=True
)
native = pytest.mark.parametrize("native_threads", [NATIVE, NATIVE_PREADV], indirect=True)


class Many(MemoryDevice):
    """Resolves nothing.  Notes how many requests it is asked for at a time."""

    batching = True

    def __init__(self, **geometry):
        super().__init__(2 * MIB, geometry=Geometry(size=2 * MIB, **geometry), resolvable=False)
        self.calls: list[tuple[str, int]] = []
        self.bad = -1
        self.error: Exception = MediaError("bad block")
        self.failure: Exception | None = None
        self.held: trio.Event | None = None
        self.alone: list[bool] = []

    async def read_many(self, requests):
        self.alone += [request.alone for request in requests]
        await self._all("read", requests, self.readv)

    async def write_many(self, requests):
        await self._all("write", requests, self.writev)

    async def _all(self, kind, requests, move):
        self.calls.append((kind, len(requests)))
        if self.held is not None:
            await self.held.wait()
        if self.failure is not None:
            raise self.failure
        for request in requests:
            if request.offset == self.bad:
                request.error = self.error
            else:
                await move(request.offset, request.buffers)


async def write(rig, offset, failed):
    try:
        await rig.front.write(offset, bytes([offset // PAGE_SIZE + 1]) * PAGE_SIZE)
    except RequestFailed:
        failed.append(offset)


async def write_all(rig, count):
    failed = []
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(write, rig, number * PAGE_SIZE, failed)
    return failed


async def check_all(rig, count):
    for number in range(count):
        found = await rig.front.read(number * PAGE_SIZE, PAGE_SIZE)
        assert found == bytes([number + 1]) * PAGE_SIZE


@native
async def test_what_comes_together_goes_together(rig_maker):
    device = Many()
    async with rig_maker(device=device) as rig:
        assert await write_all(rig, 20) == []
        await check_all(rig, 20)
    assert sum(count for kind, count in device.calls if kind == "write") == 20
    assert max(count for kind, count in device.calls) > 1


@native
async def test_drivers_that_need_aligned_memory_get_it(rig_maker):
    """What is mapped read-only is copied for them, one request at a time."""
    device = Many(memory_alignment=512)
    async with rig_maker(device=device, grants=GrantMode.MAP) as rig:
        assert await write_all(rig, 20) == []
        await check_all(rig, 20)
        assert rig.access.bugs == 0
    assert {kind for kind, _ in device.calls} == {"read"}


@every_path
async def test_who_fails_fails_alone(rig_maker):
    device = Many()
    device.bad = 3 * PAGE_SIZE
    async with rig_maker(device=device) as rig:
        failed = await write_all(rig, 8)
        assert failed == ([] if not device.calls else [3 * PAGE_SIZE])
        await check_all(rig, 3)


@native
async def test_a_call_that_fails_fails_for_all_of_them(rig_maker):
    device = Many()
    async with rig_maker(device=device) as rig:
        device.failure = RuntimeError("what?")
        assert len(await write_all(rig, 8)) == 8
        assert rig.access.bugs == len(device.calls)
        device.failure = None
        assert await write_all(rig, 8) == []
        await check_all(rig, 8)


@native
@pytest.mark.parametrize("one", [False, True])
async def test_a_device_that_breaks_is_closed_after_the_answers(rig_maker, one):
    device = Many()
    if one:
        device.bad, device.error = 0, DeviceBroken("gone")
    else:
        device.failure = DeviceBroken("gone")
    with pytest.RaisesGroup(pytest.RaisesExc(DeviceBroken, match="gone"), flatten_subgroups=True):
        async with rig_maker(device=device) as rig:
            with pytest.raises(RequestFailed):
                await rig.front.write(0, b"1" * PAGE_SIZE)


@native
async def test_what_does_not_fit_goes_alone(rig_maker):
    """Less than a block, and longer than the driver takes."""
    device = Many(request_alignment=PAGE_SIZE, max_transfer=PAGE_SIZE)
    async with rig_maker(device=device) as rig:
        await rig.front.write(0, b"s" * 512)
        await rig.front.write(PAGE_SIZE, b"l" * 4 * PAGE_SIZE)
        assert not device.calls
        await rig.front.write(8 * PAGE_SIZE, b"f" * PAGE_SIZE)
        assert device.calls == [("write", 1)]
        assert await rig.front.read(0, PAGE_SIZE) == b"s" * 512 + bytes(PAGE_SIZE - 512)
        assert await rig.front.read(PAGE_SIZE, 4 * PAGE_SIZE) == b"l" * 4 * PAGE_SIZE


@native
async def test_the_guests_memory_is_out_of_reach_when_they_are_answered(rig_maker):
    kept = []

    class Keeping(Many):
        async def write_many(self, requests):
            kept.extend(view for request in requests for view in request.buffers)
            await super().write_many(requests)

    async with rig_maker(device=Keeping()) as rig:
        await rig.front.write(0, b"k" * PAGE_SIZE)
        assert kept
        for view in kept:
            with pytest.raises(ValueError, match="released"):
                bytes(view)


@native
async def test_writes_wait_for_who_has_a_range_alone(rig_maker):
    device = Many()
    async with (
        rig_maker(device=device) as rig,
        trio.open_nursery() as nursery,
        rig.access._ranges.hold(MIB, 2 * MIB, exclusive=True),
    ):
        await rig.front.write(0, b"e" * PAGE_SIZE)
        nursery.start_soon(rig.front.write, MIB, b"w" * PAGE_SIZE)
        with trio.fail_after(10):
            while not rig.disk.connection.in_flight:
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert device.calls == [("write", 1)]
    assert device.calls == [("write", 1)] * 2


@native
async def test_who_reads_alone_is_told_so(rig_maker):
    device = Many()
    async with rig_maker(device=device) as rig:
        await rig.front.read(0, PAGE_SIZE)
        assert device.alone == [True]
        device.held = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.front.read, 0, PAGE_SIZE)
            await trio.testing.wait_all_tasks_blocked()
            while len(device.alone) < 2:
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(rig.front.read, PAGE_SIZE, PAGE_SIZE)
            while len(device.alone) < 3:
                await trio.testing.wait_all_tasks_blocked()
            device.held.set()
        assert device.alone == [True, True, False]
