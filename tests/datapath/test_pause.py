"""Disks that are paused, go on, and get another size, while a guest uses them."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from test_order_and_faults import device_with, until

from xbd.core.driver.testing import Fault, MemoryDevice
from xbd.core.errors import MediaError
from xbd.core.frontend import FrontendOptions, RequestFailed
from xbd.core.units import KIB, MIB

QUEUES = FrontendOptions(data_pages=600, indirect_segments=256, queues=3)


async def test_a_paused_disk_leaves_requests_in_the_rings(rig_maker):
    async with rig_maker(options=QUEUES) as rig, trio.open_nursery() as nursery:
        await rig.front.write(0, b"a" * 4096)
        await rig.disk.pause()
        taken = rig.disk.stats.rd_req
        for number in range(9):
            nursery.start_soon(rig.front.read, number * 4096, 4096)
        # Each ring is looked at again, and nothing is taken.
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert rig.disk.connection.in_flight == 0
        assert rig.disk.stats.rd_req == taken
        rig.disk.resume()
        with trio.fail_after(10):
            assert await rig.front.read(0, 4096) == b"a" * 4096
    assert rig.disk.stats.rd_req == taken + 10


async def test_pausing_waits_for_what_was_taken_and_makes_it_durable(rig_maker):
    gate = trio.Event()
    log = []

    def note(operation, offset, length):
        log.append(operation)
        return operation == "writev"

    device = device_with(Fault(trigger=note, wait=gate, error=None))
    async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(rig.front.write, 0, b"w" * 4096)
        await until(lambda: log)
        paused = trio.Event()

        async def pause():
            await rig.disk.pause()
            paused.set()

        nursery.start_soon(pause)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not paused.is_set()
        assert log == ["writev"]
        gate.set()
        with trio.fail_after(10):
            await paused.wait()
        assert log == ["writev", "flush"]
        rig.disk.resume()


async def test_a_pause_that_is_given_up_or_fails_leaves_the_disk_in_use(rig_maker):
    gate = trio.Event()
    stuck = Fault(operations={"readv"}, trigger=lambda _o, at, _n: at == 0, wait=gate, error=None)
    broken = Fault(operations={"flush"}, error=lambda: MediaError("no"))
    async with rig_maker(device=device_with(stuck, broken)) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(rig.front.read, 0, 4096)
        await until(lambda: rig.disk.connection.in_flight == 1)
        with trio.move_on_after(0.02) as patience:
            await rig.disk.pause()
        assert patience.cancelled_caught
        assert not rig.disk.paused
        with trio.fail_after(10):
            await rig.front.read(8192, 4096)
        gate.set()
        with pytest.raises(MediaError):
            await rig.disk.pause()
        with trio.fail_after(10):
            await rig.front.read(0, 4096)


async def test_a_paused_disk_can_be_closed_and_stays_paused_for_the_next_connection(rig_maker):
    async with rig_maker() as rig, trio.open_nursery() as nursery:
        await rig.disk.pause()
        await rig.disk.disconnect(drain=True)
        await rig.connect()
        nursery.start_soon(rig.front.read, 0, 4096)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert rig.disk.connection.in_flight == 0
        rig.disk.resume()
        with trio.fail_after(10):
            await rig.front.read(4096, 4096)


async def test_a_disk_can_be_paused_before_its_connection_is_served(rig_maker):
    async with rig_maker() as rig, trio.open_nursery() as nursery:
        await rig.disk.disconnect(drain=True)
        await rig.connect()
        await rig.disk.pause()
        nursery.start_soon(rig.front.read, 0, 4096)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert rig.disk.stats.rd_req == 0
        rig.disk.resume()
        with trio.fail_after(10):
            await rig.front.read(4096, 4096)


@pytest.mark.parametrize("drain", [False, True])
async def test_a_connection_can_be_closed_before_it_is_served(rig_maker, drain):
    async with rig_maker() as rig:
        await rig.disk.disconnect(drain=True)
        await rig.connect()
        with trio.fail_after(10):
            await rig.disk.disconnect(drain=drain)
            await rig.connect()
            await rig.front.write(0, b"a" * 4096)
            assert await rig.front.read(0, 4096) == b"a" * 4096


async def test_a_disk_that_is_paused_again_and_again_loses_nothing(rig_maker):
    block = 16 * KIB
    dice = random.Random(1)
    async with rig_maker(options=QUEUES) as rig, trio.open_nursery() as nursery:

        async def work(start):
            for number in range(60):
                data = dice.randbytes(block)
                at = start + number % 4 * block
                await rig.front.write(at, data)
                assert await rig.front.read(at, block) == data

        async def keep_pausing():
            while True:
                await rig.disk.pause()
                assert rig.disk.connection.in_flight == 0
                rig.disk.resume()
                await trio.lowlevel.checkpoint()

        nursery.start_soon(keep_pausing)
        with trio.fail_after(60):
            async with trio.open_nursery() as workers:
                for number in range(6):
                    workers.start_soon(work, number * 4 * block)
        nursery.cancel_scope.cancel()
    assert rig.disk.stats.errors == 0


async def test_a_disk_grows_and_shrinks_while_it_is_in_use(rig_maker):
    device = MemoryDevice(MIB)
    async with rig_maker(device=device) as rig:
        with pytest.raises(RequestFailed):
            await rig.front.write(MIB, b"n" * 4096)
        await rig.disk.resize(2 * MIB)
        await rig.front.write(MIB, b"n" * 4096)
        assert await rig.front.read(MIB, 8192) == b"n" * 4096 + bytes(4096)
        await rig.disk.resize(MIB // 2)
        for offset in (MIB, MIB // 2):
            with pytest.raises(RequestFailed):
                await rig.front.read(offset, 4096)
        assert await rig.front.read(MIB // 2 - 4096, 4096) == bytes(4096)
