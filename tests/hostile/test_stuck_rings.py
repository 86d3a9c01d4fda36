"""Requests that try to wedge a ring, to overrun its tables, or to outlive its connection."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing
from hostile_world import MODES, SECONDS, until

from xbd.core.blkif import constants, encode
from xbd.core.datapath import Features, GrantMode
from xbd.core.driver import HostExtent
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice
from xbd.core.errors import DeviceBroken
from xbd.core.units import MIB, PAGE_SIZE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", [constants.WRITE_BARRIER, constants.FLUSH_DISKCACHE])
async def test_barriers_without_a_page_hold_nothing_back(field, mode, operation):
    """A deep ring of them, too: each fails by itself, and none counts on the one before."""
    async with field.attacker(mode=mode, order=4) as attacker:
        bad = 900  # never granted
        entries = [
            attacker.rw(operation, 8 * number, [(bad, 0, 7)], number)
            for number in range(attacker.ring.entries)
        ]
        answers = await attacker.ring.ask(*entries)
        assert sorted(answers) == [(number, operation, -1) for number in range(512)]
        await attacker.must_serve()


async def test_requests_that_wait_for_memory_don_t_pile_up_on_the_stack(field):
    """Some are slow, so that the memory of one goes round among five hundred."""
    gate = trio.Event()
    device = MemoryDevice(MIB)
    slow = Fault(operations={"writev"}, wait=gate, error=None)
    faulty = FaultDevice(device, slow)
    # Reads of the odd half resolve, all else comes through the gate.
    faulty.resolve = lambda offset, length, *, for_write: (
        None if for_write else device.resolve(offset, length, for_write=False)
    )
    async with field.attacker(mode=GrantMode.COPY, order=4, device=faulty) as attacker:
        data, table = attacker.pages(2)
        packed = encode.pack_indirect_page([(data, 0, 7)] * 256)
        attacker.guest.page(table)[: len(packed)] = packed

        def big(number, operation):
            return encode.encode_indirect(attacker.abi, operation, number, 0, 256, [table])

        writes = [big(number, constants.WRITE) for number in range(15)]
        reads = [big(number, constants.READ) for number in range(15, 512)]
        attacker.ring.put(*writes, *reads)
        attacker.ring.publish()
        answers = await attacker.ring.collect(497)
        gate.set()
        answers += await attacker.ring.collect(15)
        assert {status for _, _, status in answers} == {0}
        assert len(set(answers)) == 512
        await attacker.must_serve()


@pytest.mark.parametrize("mode", MODES)
async def test_more_segments_than_the_engine_has_room_for(field, mode):
    """An administrator may offer long requests; one must not spill over into the next."""
    features = Features(max_indirect_segments=4096)
    async with field.attacker(mode=mode, features=features, size=4 * MIB, order=1) as attacker:
        ring = attacker.ring
        data = attacker.pages(64)
        tables = attacker.pages(8)
        for number, ref in enumerate(data):
            attacker.guest.page(ref)[:] = bytes([number]) * PAGE_SIZE
        # Scattered sectors: nothing can be merged.
        pages = [(7 * i + i // 64) % 64 for i in range(4096)]
        segments = [(data[page], i % 8, i % 8) for i, page in enumerate(pages)]
        for number, ref in enumerate(tables):
            packed = encode.pack_indirect_page(segments[512 * number : 512 * number + 512])
            attacker.guest.page(ref)[:] = packed
        expected = b"".join(bytes([page]) * 512 for page in pages)

        def request(number, operation, sector, count):
            return encode.encode_indirect(
                attacker.abi, operation, number, sector, count, tables[: -(-count // 512)]
            )

        longs = [request(i, constants.WRITE, 512 * i, 300) for i in range(8)]
        assert {answer[2] for answer in await ring.ask(*longs)} == {0}
        for number in range(8):
            at = 512 * 512 * number
            assert attacker.device.disk.content[at : at + 300 * 512] == expected[: 300 * 512]
        assert (await ring.ask(request(1, constants.WRITE, 4096, 4096)))[0][2] == 0
        assert attacker.device.disk.content[2 * MIB :] == expected
        for ref in data:
            attacker.guest.page(ref)[:] = bytes(PAGE_SIZE)
        assert (await ring.ask(request(2, constants.READ, 4096, 4096)))[0][2] == 0
        for number, ref in enumerate(data):
            touched = {i % 8 for i in range(4096) if pages[i] == number}
            for sector in range(8):
                page = bytes(attacker.guest.page(ref)[512 * sector : 512 * sector + 512])
                assert page == bytes([number if sector in touched else 0]) * 512


class Stubborn(MemoryDevice):
    """What it does can't be cancelled, like a thread that waits for storage; and what it resolves
    is a pipe, from which the engine would read for ever."""

    def __init__(self, gate: trio.Event, pipe: int) -> None:
        super().__init__(MIB)
        self.gate = gate
        self.pipe = pipe
        self.nursery: trio.Nursery | None = None
        """Of the task that waits at the gate."""

    def resolve(self, offset, length, *, for_write):
        if for_write:
            return None
        return [HostExtent(fd=self.pipe, offset=offset, length=length)]

    async def writev(self, offset, buffers):
        self.nursery = trio.lowlevel.current_task().parent_nursery
        with trio.CancelScope(shield=True):
            await self.gate.wait()
            await super().writev(offset, buffers)

    async def flush(self):
        with trio.CancelScope(shield=True):
            await super().flush()


@pytest.mark.parametrize("mode", MODES)
async def test_what_waits_behind_a_barrier_is_not_begun_after_the_end(field, mode):
    """The barrier ends when the ring is given up already: nobody is there for what follows."""
    gate = trio.Event()
    pipe, other_end = os.pipe()
    device = Stubborn(gate, pipe)
    async with field.attacker(mode=mode, device=device, order=1) as attacker:
        source, target = attacker.pages(2)
        os.write(other_end, bytes(PAGE_SIZE))
        await attacker.ring.ask(attacker.rw(constants.READ, 8, [(target, 0, 7)]))
        attacker.ring.put(attacker.rw(constants.WRITE_BARRIER, 0, [(source, 0, 7)], 1))
        for number in range(2, 40):
            attacker.ring.put(attacker.rw(constants.READ, 8, [(target, 0, 7)], number))
        attacker.ring.publish()
        await until(lambda: device.nursery is not None)
        await attacker.consumed()
        attacker.ring.words[0] = attacker.ring.prod + 1000
        attacker.ring.port.notify()
        await until(lambda: device.nursery.cancel_scope.cancel_called)
        gate.set()
        await attacker.until_ended()
        assert not field.lines("storage does not answer")
    os.close(other_end)
    os.close(pipe)


async def test_events_that_come_just_when_the_disk_closes(field):
    """What watches for them has to let go of the guest all the same, and at once."""
    async with field.attacker(order=2, size=2 * MIB) as attacker:
        data = attacker.pages(256)
        (table,) = attacker.pages(1)
        packed = encode.pack_indirect_page([(ref, 0, 7) for ref in data])
        attacker.guest.page(table)[: len(packed)] = packed
        read = encode.encode_indirect(attacker.abi, constants.READ, 1, 0, 256, [table])
        ring = attacker.ring
        for _ in range(20):
            ring.put(*[read] * (ring.entries // 2))
            ring.publish()
            await attacker.consumed()  # and it is busy with them
            ring.put(*[read] * (ring.entries // 2))
            ring.publish()
            with trio.fail_after(5):
                await attacker.link.abandon()
            ring.prod = ring.cons = ring.words[2]
            ring.words[0] = ring.prod
            await attacker.connect()
        await attacker.must_serve()


async def test_reads_that_were_abandoned_deliver_nothing(field):
    """Bounce memory still has what another request left there."""
    gate = trio.Event()
    slow = Fault(operations={"readv"}, wait=gate, error=None)
    device = FaultDevice(MemoryDevice(MIB), slow)
    async with field.attacker(mode=GrantMode.COPY, device=device) as attacker:
        source, target = attacker.pages(2)
        attacker.guest.page(source)[:] = b"s" * PAGE_SIZE
        attacker.guest.page(target)[:] = b"t" * PAGE_SIZE
        await attacker.ring.ask(attacker.rw(constants.WRITE, 0, [(source, 0, 7)]))
        attacker.ring.put(attacker.rw(constants.READ, 8, [(target, 0, 7)]))
        attacker.ring.publish()
        await until(lambda: slow.hits)
        await attacker.link.abandon()
        assert bytes(attacker.guest.page(target)) == b"t" * PAGE_SIZE


async def test_a_drain_ends_with_the_disk(field):
    """It breaks while others wait for its last answers: they need not wait for ever."""
    gate = trio.Event()
    broken = Fault(operations={"writev"}, wait=gate, error=lambda: DeviceBroken("the cable is out"))
    slow = Fault(operations={"flush"}, wait=trio.Event(), error=None, times=1)
    device = FaultDevice(MemoryDevice(MIB), broken, slow)
    async with field.attacker(device=device, may_fail=DeviceBroken) as attacker:
        (page,) = attacker.pages(1)
        attacker.ring.put(
            attacker.rw(constants.FLUSH_DISKCACHE, 0, [], 1),
            attacker.rw(constants.WRITE, 0, [(page, 0, 7)], 2),
        )
        attacker.ring.publish()
        await until(lambda: broken.hits and slow.hits)
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attacker.link.drain, SECONDS)
            await trio.testing.wait_all_tasks_blocked(0.001)
            gate.set()
        assert trio.current_time() < begin + SECONDS
        assert isinstance(attacker.link.failure, DeviceBroken)


@pytest.mark.parametrize("mode", MODES)
async def test_the_longest_requests_at_full_depth_on_four_queues(field, mode):
    """1 MiB each, all of the same pages: memory is bounded, and everybody is answered."""
    async with field.attacker(mode=mode, order=2, queues=4, size=2 * MIB) as attacker:
        data = attacker.pages(256)
        (table,) = attacker.pages(1)
        packed = encode.pack_indirect_page([(ref, 0, 7) for ref in data])
        attacker.guest.page(table)[: len(packed)] = packed
        for number, ring in enumerate(attacker.rings):
            for index in range(ring.entries):
                operation = (number + index) % 2
                sector = 2048 * (index % 2)
                ring.put(
                    encode.encode_indirect(attacker.abi, operation, index, sector, 256, [table])
                )
            ring.publish()
        for ring in attacker.rings:
            answers = await ring.collect(ring.entries)
            assert sorted(i for i, _, _ in answers) == list(range(ring.entries))
            assert {status for _, _, status in answers} == {0}
        await field.victim_is_well()
        with trio.fail_after(SECONDS):
            await attacker.disconnect()
        field.nothing_is_left()
