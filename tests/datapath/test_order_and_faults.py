"""What waits for what, and what an error does and does not do."""

from __future__ import annotations

import errno
import os

import pytest
import trio
import trio.testing

from xbd.core.blkif import BackRing, constants
from xbd.core.datapath import GrantMode, pages
from xbd.core.datapath.pages.copied import CopiedPages
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice
from xbd.core.errors import DeviceBroken, MediaError, NoSpace, Unsupported
from xbd.core.frontend import FrontendOptions, RequestFailed
from xbd.core.units import KIB, MIB, PAGE_SIZE


async def until(condition) -> None:
    """Threads serve the rings: what they will have done soon."""
    with trio.fail_after(10):
        while not condition():
            await trio.lowlevel.checkpoint()


def device_with(*faults: Fault, size: int = MIB) -> FaultDevice:
    return FaultDevice(MemoryDevice(size), *faults)


async def test_answers_leave_in_any_order(rig_maker):
    gate = trio.Event()
    slow = Fault(operations={"readv"}, trigger=lambda _o, at, _n: at == 0, wait=gate, error=None)
    async with rig_maker(device=device_with(slow)) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(rig.front.read, 0, 4096)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(100):  # the ring goes round three times past the request that is stuck
            await rig.front.read(8192, 4096)
        assert rig.disk.connection.in_flight == 1
        gate.set()


async def test_what_the_driver_ends_at_once_is_answered_together(python_rig_maker, monkeypatch):
    """A guest that is woken for each single answer costs more than the answers."""
    gate = trio.Event()
    slow = Fault(operations={"readv"}, wait=gate, error=None)
    pushed = []
    push = BackRing.push
    monkeypatch.setattr(BackRing, "push", lambda ring: (pushed.append(ring), push(ring))[1])
    async with python_rig_maker(device=device_with(slow)) as rig:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(rig.front.read, number * 4096, 4096)
            await until(lambda: rig.disk.connection.in_flight == 20)
            await trio.testing.wait_all_tasks_blocked()
            assert pushed == []
            gate.set()
        assert rig.disk.stats.rd_req == 20
    assert len(pushed) <= 2


async def test_a_barrier_waits_for_what_is_before_it_and_holds_back_what_is_behind(rig_maker):
    gate = trio.Event()
    log = []

    def note(operation, offset, length):
        log.append((operation, offset))
        return (operation, offset) == ("writev", 0)

    device = device_with(Fault(trigger=note, wait=gate, error=None))
    async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
        data = memoryview(b"d" * 4096)
        nursery.start_soon(rig.front.write, 0, data)
        await until(lambda: log)

        async def barrier():
            operation = constants.WRITE_BARRIER
            await rig.front.transfer(4096, data, write=True, operation=operation)

        nursery.start_soon(barrier)
        await until(lambda: rig.disk.connection.in_flight == 2)
        nursery.start_soon(rig.front.write, 8192, data)
        await until(lambda: rig.disk.connection.in_flight == 3)
        nursery.start_soon(rig.front.barrier)
        await until(lambda: rig.disk.connection.in_flight == 4)
        await trio.testing.wait_all_tasks_blocked()
        assert log == [("writev", 0)]
        gate.set()
    assert log[:4] == [("writev", 0), ("flush", 0), ("writev", 4096), ("flush", 0)]
    assert log[4:6] == [("writev", 8192), ("flush", 0)]


async def test_a_flush_does_not_wait_for_requests_in_flight(rig_maker):
    gate = trio.Event()
    slow = Fault(operations={"writev"}, wait=gate, error=None)
    async with rig_maker(device=device_with(slow)) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(rig.front.write, 0, b"s" * 4096)
        await until(lambda: rig.disk.connection.in_flight == 1)
        await rig.front.flush()
        assert rig.disk.connection.in_flight == 1
        gate.set()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MediaError("bad block"), constants.RSP_ERROR),
        (NoSpace("the host is full"), constants.RSP_ERROR),
        (Unsupported("not here"), constants.RSP_EOPNOTSUPP),
        (OSError(errno.EIO, "unexpected"), constants.RSP_ERROR),
    ],
)
async def test_an_error_fails_its_request_and_the_disk_lives_on(rig_maker, error, status):
    fault = Fault(operations={"writev", "discard"}, times=2, error=lambda: error)
    device = device_with(fault)
    async with rig_maker(device=device) as rig:
        with pytest.raises(RequestFailed) as failure:
            await rig.front.write(0, b"e" * 4096)
        assert failure.value.status == status
        with pytest.raises(RequestFailed) as failure:
            await rig.front.discard(0, 4096)
        assert failure.value.status == status
        assert rig.disk.stats.errors == 2
        assert rig.disk.stats.last_error
        await rig.front.write(0, b"f" * 4096)
        assert await rig.front.read(0, 4096) == b"f" * 4096


async def test_a_broken_device_is_answered_and_closed(rig_maker):
    fault = Fault(operations={"readv"}, error=lambda: DeviceBroken("the cable is out"))
    rigs = []

    async def use():
        async with rig_maker(device=device_with(fault)) as rig:
            rigs.append(rig)
            with pytest.raises(RequestFailed):
                await rig.front.read(0, 4096)
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as failure:
        await use()
    assert failure.value.subgroup(DeviceBroken) is not None
    assert rigs[0].disk.stats.errors == 1


async def test_a_short_transfer_is_tried_again_by_the_driver(rig_maker):
    """The image became shorter behind our back: the engine sees it, the driver judges."""
    device = MemoryDevice(MIB)
    async with rig_maker(device=device) as rig:
        await rig.front.write(0, b"s" * 8192)
        await rig.front.read(0, 8192)
        failed = Fault(operations={"readv"})
        broken = FaultDevice(device, failed)
        rig.access._device = broken
        os.ftruncate(device.disk.fd, 4096)
        with pytest.raises(RequestFailed):
            await rig.front.read(4096, 4096)
        assert failed.hits == 1
        assert await rig.front.read(0, 4096) == b"s" * 4096


async def test_invalidate_waits_for_transfers_through_old_answers(rig_maker):
    device = MemoryDevice(MIB)
    async with rig_maker(device=device) as rig:
        await rig.front.read(0, 4096)
        asked = []
        resolve = device.resolve

        def counting(offset, length, *, for_write):
            asked.append(offset)
            return resolve(offset, length, for_write=for_write)

        device.resolve = counting
        await rig.front.read(0, 4096)
        assert asked == []
        await rig.access.invalidate(0, MIB)
        await rig.front.read(0, 4096)
        assert asked == [0]


async def test_a_resize_while_a_frontend_connects_is_not_missed(rig_maker):
    async with rig_maker(size=MIB) as rig:
        for number in range(1, 30):
            await rig.disk.disconnect(drain=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rig.connect)
                await trio.lowlevel.checkpoint()
                await rig.disk.resize((number + 1) * MIB)
            await rig.front.write(number * MIB, b"n" * 4096)


async def test_requests_wait_while_bounce_memory_is_short(rig_maker, monkeypatch):
    monkeypatch.setattr(CopiedPages.__init__, "__defaults__", (16,))
    options = FrontendOptions(persistent=False, indirect_segments=0, data_pages=600)
    async with rig_maker(grants=GrantMode.COPY, options=options) as rig:
        async with trio.open_nursery() as nursery:
            for number in range(32):
                nursery.start_soon(rig.front.write, number * 44 * KIB, bytes([number]) * 44 * KIB)
        for number in range(32):
            assert await rig.front.read(number * 44 * KIB, 44 * KIB) == bytes([number]) * 44 * KIB


async def test_persistent_pages_are_bounded_and_the_oldest_go(rig_maker, monkeypatch):
    monkeypatch.setattr(pages, "MAX_PAGES", 40)
    options = FrontendOptions(data_pages=600, indirect_segments=64)
    async with rig_maker(options=options) as rig:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(rig.front.write, number * 128 * KIB, bytes([number]) * 128 * KIB)
        for number in range(8):
            data = await rig.front.read(number * 128 * KIB, 128 * KIB)
            assert data == bytes([number]) * 128 * KIB
            assert rig.host.hypervisor.mapped_pages <= 40 + 1


async def test_nothing_stays_mapped_after_mapping_per_request(rig_maker):
    options = FrontendOptions(persistent=False)
    async with rig_maker(grants=GrantMode.MAP, options=options) as rig:
        await rig.front.write(0, b"m" * 128 * KIB)
        assert rig.host.hypervisor.mapped_pages == 1  # the ring


async def test_an_abandoned_connection_gives_everything_back(rig_maker):
    gate = trio.Event()
    slow = Fault(operations={"writev"}, wait=gate, error=None)
    for mode in (GrantMode.PERSISTENT, GrantMode.MAP, GrantMode.COPY):
        options = FrontendOptions(persistent=mode is GrantMode.PERSISTENT)
        async with (
            rig_maker(device=device_with(slow), grants=mode, options=options) as rig,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(rig.front.write, 0, b"s" * PAGE_SIZE)
            await until(lambda: rig.disk.connection.in_flight == 1)
            await rig.disk.disconnect(drain=False)
            assert rig.host.hypervisor.mapped_pages == 0
            assert rig.host.hypervisor.bound_ports == 0
            nursery.cancel_scope.cancel()
