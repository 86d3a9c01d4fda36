"""Writes for which a driver finds a place, so that the data path can make them by itself."""

from __future__ import annotations

import os
from functools import partial

import pytest
import trio
import trio.testing
from data_paths import NATIVE, NATIVE_PREADV, PYTHON
from placing_device import UNIT, Placing

from xbd.core.driver import DriverError
from xbd.core.errors import DeviceBroken
from xbd.core.frontend.errors import RequestFailed
from xbd.core.units import MIB, PAGE_SIZE

pytestmark = pytest.mark.parametrize(
    "native_threads", [PYTHON, NATIVE, NATIVE_PREADV], indirect=True
)


async def write_all(rig, offsets, content=b"w"):
    async with trio.open_nursery() as nursery:
        for offset in offsets:
            nursery.start_soon(rig.front.write, offset, content * PAGE_SIZE)


async def being_placed(rig, device, nursery):
    """A write whose place is being sought, and is not found before `device.held` is set."""
    nursery.start_soon(rig.front.write, 0, b"1" * PAGE_SIZE)
    with trio.fail_after(10):
        while not device.calls:
            await trio.lowlevel.checkpoint()


async def in_flight(rig, count):
    """Until so many requests are, and nothing more happens."""
    with trio.fail_after(10):
        while rig.disk.connection.in_flight < count:
            await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_what_can_be_placed_is_written_past_the_driver(rig_maker):
    device = Placing()
    async with rig_maker(device=device) as rig:
        offsets = [number * UNIT for number in range(9)]
        await write_all(rig, offsets)
        assert sorted(device.written) == [2 * UNIT, 5 * UNIT, 8 * UNIT]
        for offset in offsets:
            assert await rig.front.read(offset, PAGE_SIZE) == b"w" * PAGE_SIZE
            assert os.pread(device.disk.fd, PAGE_SIZE, offset) == b"w" * PAGE_SIZE
        before = len(device.calls)
        await write_all(rig, [offset for offset in offsets if offset // UNIT % 3 != 2], b"v")
        assert len(device.calls) == before  # they have their places
        assert sum(map(len, device.calls)) == 9


async def test_writes_that_come_meanwhile_are_placed_together(rig_maker):
    device = Placing()
    device.held = trio.Event()
    async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
        await being_placed(rig, device, nursery)
        nursery.start_soon(write_all, rig, [3 * UNIT, 4 * UNIT, 6 * UNIT])
        await in_flight(rig, 4)
        assert device.calls == [[(0, PAGE_SIZE)]]
        device.held.set()
        nursery.cancel_scope.deadline = trio.current_time() + 10
    assert sorted(each for call in device.calls[1:] for each in call) == [
        (n * UNIT, PAGE_SIZE) for n in (3, 4, 6)
    ]
    assert not device.written


@pytest.mark.parametrize("error", [DriverError("full", errno=28), RuntimeError("what?")])
async def test_where_placing_fails_the_driver_writes(rig_maker, caplog, error):
    device = Placing()
    device.error = error
    async with rig_maker(device=device) as rig:
        await write_all(rig, [0, UNIT])
        assert sorted(device.written) == [0, UNIT]
        device.error = None
        await write_all(rig, [0])
        assert len(device.written) == 2
    assert rig.access.bugs == (0 if isinstance(error, DriverError) else len(device.calls) - 1)


async def test_a_device_that_breaks_in_placing_is_told_by_writing(rig_maker):
    class Breaking(Placing):
        async def writev(self, offset, buffers):
            raise DeviceBroken("gone")

    device = Breaking()
    device.error = DeviceBroken("gone")
    with pytest.RaisesGroup(pytest.RaisesExc(DeviceBroken, match="gone"), flatten_subgroups=True):
        async with rig_maker(device=device) as rig:
            with pytest.raises(RequestFailed):
                await rig.front.write(0, b"1" * PAGE_SIZE)


async def test_nothing_is_placed_in_a_range_that_somebody_has_alone(rig_maker):
    """As a snapshot has all of them: it is taken of what was written before."""
    device = Placing()
    async with (
        rig_maker(device=device) as rig,
        trio.open_nursery() as nursery,
        rig.access._ranges.hold(0, 2 * MIB, exclusive=True),
    ):
        nursery.start_soon(rig.front.write, 0, b"1" * PAGE_SIZE)
        await in_flight(rig, 1)
        assert not device.calls
    assert device.calls == [[(0, PAGE_SIZE)]]


async def test_who_leaves_while_places_are_sought(rig_maker):
    device = Placing()
    device.held = trio.Event()
    async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
        await being_placed(rig, device, nursery)
        with trio.fail_after(10):
            await rig.disk.disconnect(drain=False)
        assert not device.places
        assert not device.written
        nursery.cancel_scope.cancel()


async def test_a_drain_waits_for_places(rig_maker):
    device = Placing()
    device.held = trio.Event()
    async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
        await being_placed(rig, device, nursery)
        with trio.fail_after(10):
            nursery.start_soon(partial(rig.disk.disconnect, drain=True))
            await trio.testing.wait_all_tasks_blocked(0.01)
            device.held.set()
    assert os.pread(device.disk.fd, PAGE_SIZE, 0) == b"1" * PAGE_SIZE
