"""What is ordered and what is not: the rules of docs/datapath.md, on every data path."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import trio
import trio.testing
from data_paths import NATIVE, NATIVE_PREADV, PYTHON, threads_of
from piped_device import piped

from xbd.core.blkif import constants
from xbd.core.datapath import engine
from xbd.core.driver import Capability, Geometry, HostExtent
from xbd.core.driver.buffers import gather, scatter, total
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice
from xbd.core.frontend import FrontendOptions
from xbd.core.units import KIB, MIB, PAGE_SIZE


async def until(condition) -> None:
    """Threads serve the rings: what they will have done soon."""
    with trio.fail_after(10):
        while not condition():
            await trio.lowlevel.checkpoint()


class Logging(FaultDevice):
    """Notes which methods were called where; holds back those that a test wants."""

    def __init__(self, *held: tuple[str, int]) -> None:
        self.gate = trio.Event()
        self.log: list[tuple[str, int]] = []

        def note(operation, offset, _length):
            self.log.append((operation, offset))
            return (operation, offset) in held

        super().__init__(MemoryDevice(MIB), Fault(trigger=note, wait=self.gate, error=None))


async def write(rig, offset, *, operation=constants.WRITE):
    data = memoryview(bytes([(offset // PAGE_SIZE + 1) % 256]) * PAGE_SIZE)
    await rig.front.transfer(offset, data, write=True, operation=operation)


# -- barriers and flushes -------------------------------------------------------------------


@pytest.mark.parametrize("native_threads", [PYTHON, NATIVE], indirect=True)
async def test_a_barrier_waits_for_what_the_data_path_moves_by_itself(rig_maker):
    try:
        engine.UringEngine().close()
    except OSError as error:
        pytest.skip(f"no io_uring: {error.strerror}")
    with piped() as device:
        written = []
        writev = device.writev

        async def noting(offset, buffers):
            written.append(offset)
            await writev(offset, buffers)

        device.writev = noting
        async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(rig.front.read, 0, PAGE_SIZE)
            await until(lambda: device.asked and rig.disk.connection.in_flight == 1)
            nursery.start_soon(rig.front.barrier)
            await until(lambda: rig.disk.connection.in_flight == 2)
            nursery.start_soon(write, rig, MIB)
            await until(lambda: rig.disk.connection.in_flight == 3)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert written == []
            device.end_a_read()
        assert written == [MIB]


async def test_a_barrier_holds_back_its_own_ring_alone(rig_maker):
    device = Logging(("writev", 0))
    options = FrontendOptions(queues=2)
    async with rig_maker(device=device, options=options) as rig, trio.open_nursery() as nursery:

        def on_ring(number, function, *arguments):
            async def run():
                rig.front._turn = number
                await function(*arguments)

            nursery.start_soon(run)

        on_ring(0, write, rig, 0)
        await until(lambda: device.log)
        on_ring(0, rig.front.barrier)
        await until(lambda: rig.disk.connection.in_flight == 2)
        on_ring(0, write, rig, PAGE_SIZE)
        await until(lambda: rig.disk.connection.in_flight == 3)
        rig.front._turn = 1
        await write(rig, 2 * PAGE_SIZE)
        rig.front._turn = 1
        await rig.front.barrier()
        assert device.log == [("writev", 0), ("writev", 2 * PAGE_SIZE), ("flush", 0)]
        device.gate.set()
        await until(lambda: rig.disk.connection.in_flight == 0)
        assert device.log[3:] == [("flush", 0), ("writev", PAGE_SIZE)]


async def test_a_flush_with_data_makes_durable_what_was_before_it(rig_maker):
    """And not its own data: that is what a barrier does."""
    device = Logging()
    async with rig_maker(device=device) as rig:
        await write(rig, 0, operation=constants.FLUSH_DISKCACHE)
        await write(rig, PAGE_SIZE, operation=constants.WRITE_BARRIER)
    assert device.log[:2] == [("flush", 0), ("writev", 0)]
    assert device.log[2:5] == [("flush", 0), ("writev", PAGE_SIZE), ("flush", 0)]


async def test_what_was_answered_is_in_the_file_when_the_driver_is_told_to_flush(rig_maker):
    """Though the driver has seen nothing of it."""

    class Flushed(MemoryDevice):
        content = b""

        async def flush(self):
            self.content = self.disk.content

        async def writev(self, offset, buffers):
            raise AssertionError("the data path writes by itself")

    device = Flushed(MIB)
    async with rig_maker(device=device) as rig:
        for number in range(20):
            await write(rig, number * PAGE_SIZE)
            await rig.front.flush()
            assert device.content[number * PAGE_SIZE] == number + 1


# -- what overlaps --------------------------------------------------------------------------

UNIT = 16 * KIB
PLACES = 3 * (256 * KIB // UNIT)
LOST = b"\xee" * UNIT
"""What lies where nothing of the disk lies any more."""


class CopyOnWrite(MemoryDevice):
    """Units of one file, which may all be kept for a snapshot: whatever is written to one then
    goes to another place, and the old one is used for something else."""

    def __init__(self) -> None:
        super().__init__(256 * KIB)
        self._file = os.memfd_create("copy-on-write", os.MFD_CLOEXEC)
        os.pwrite(self._file, LOST * PLACES, 0)
        self._units = self.geometry.size // UNIT
        self._places = list(range(self._units))
        self._free = list(range(self._units, PLACES))
        self._shared: set[int] = set()
        self._locks = [trio.Lock() for _ in self._places]
        self.access = None
        self.moved = 0
        os.pwrite(self._file, bytes(self.geometry.size), 0)

    def resolve(self, offset, length, *, for_write):
        unit, inside = divmod(offset, UNIT)
        place = self._places[unit]
        if place is None or (for_write and unit in self._shared):
            return None
        return [HostExtent(fd=self._file, offset=place * UNIT + inside, length=UNIT - inside)]

    async def keep(self) -> None:
        """Of what is there now nothing is changed any more."""
        self._shared = set(range(self._units))
        await self.access.invalidate(0, self.geometry.size)

    async def readv(self, offset, buffers):
        await self._begin(Capability.NONE, offset, total(buffers), buffers)
        data = bytearray(total(buffers))
        for unit, inside, at, size in _by_unit(offset, len(data)):
            async with self._locks[unit]:
                place = self._places[unit] * UNIT + inside
                data[at : at + size] = os.pread(self._file, size, place)
        scatter(memoryview(data), buffers)

    async def writev(self, offset, buffers):
        await self._begin(Capability.WRITE, offset, total(buffers), buffers)
        data = bytearray(total(buffers))
        gather(buffers, memoryview(data))
        for unit, inside, at, size in _by_unit(offset, len(data)):
            async with self._locks[unit]:
                if unit in self._shared:
                    await self._move(unit)
                place = self._places[unit] * UNIT + inside
                os.pwrite(self._file, data[at : at + size], place)

    async def _move(self, unit: int) -> None:
        old, self._places[unit] = self._places[unit], None
        await self.access.invalidate(unit * UNIT, UNIT)  # what is written there comes along
        new = self._free.pop(0)
        os.pwrite(self._file, os.pread(self._file, UNIT, old * UNIT), new * UNIT)
        os.pwrite(self._file, LOST, old * UNIT)
        self._free.append(old)
        self._shared.discard(unit)
        self._places[unit] = new
        self.moved += 1

    async def aclose(self):
        if not self.closed:
            os.close(self._file)
        await super().aclose()


def _by_unit(offset, length):
    """Unit, place in it, place in the data, and length."""
    done = 0
    while done < length:
        unit, inside = divmod(offset + done, UNIT)
        size = min(UNIT - inside, length - done)
        yield unit, inside, done, size
        done += size


async def test_what_comes_after_an_answer_sees_what_was_answered(rig_maker):
    """Whoever writes, driver or data path, and whoever reads then; nothing is torn or lost."""
    device = CopyOnWrite()
    pages = device.geometry.size // PAGE_SIZE
    answered = [0] * pages
    asked = [0] * pages
    async with rig_maker(device=device) as rig:
        device.access = rig.access
        ended = trio.Event()  # who is cancelled would leave a request in flight

        async def keep_writing(page):
            for number in itertools.count(1):
                if ended.is_set():
                    break
                asked[page] = number
                await rig.front.write(page * PAGE_SIZE, number.to_bytes(4, "little") * 1024)
                answered[page] = number

        async def keep_reading(seed):
            dice = random.Random(seed)
            while not ended.is_set():
                first = dice.randrange(pages - 8)
                least = answered[first : first + 8]
                data = await rig.front.read(first * PAGE_SIZE, 8 * PAGE_SIZE)
                for number in range(8):
                    page = data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
                    found = int.from_bytes(page[:4], "little")
                    assert page == page[:4] * 1024
                    assert least[number] <= found <= asked[first + number]

        async with trio.open_nursery() as nursery:
            for page in range(0, pages, 3):
                nursery.start_soon(keep_writing, page)
            for seed in range(4):
                nursery.start_soon(keep_reading, seed)
            with trio.fail_after(60):
                while device.moved < 300:
                    await device.keep()
                    await trio.lowlevel.checkpoint()
            ended.set()
        for page in range(pages):
            data = await rig.front.read(page * PAGE_SIZE, PAGE_SIZE)
            assert int.from_bytes(data[:4], "little") == answered[page] == asked[page]
        assert rig.disk.stats.errors == 0


async def test_sectors_of_one_block_that_are_written_at_the_same_time_are_all_kept(rig_maker):
    """The disk takes whole blocks: what is smaller is read, changed and written."""
    geometry = Geometry(size=MIB, request_alignment=PAGE_SIZE)
    device = MemoryDevice(MIB, geometry=geometry)
    async with rig_maker(device=device) as rig:
        for block in range(0, 40, 2):

            async def sector(at, block=block):
                await rig.front.write(block * PAGE_SIZE + at * 512, bytes([at + 1]) * 512)

            async with trio.open_nursery() as nursery:
                for at in range(8):
                    nursery.start_soon(sector, at)
                    nursery.start_soon(write, rig, (block + 1) * PAGE_SIZE)
        for block in range(0, 40, 2):
            data = await rig.front.read(block * PAGE_SIZE, 2 * PAGE_SIZE)
            assert data[:PAGE_SIZE] == b"".join(bytes([at + 1]) * 512 for at in range(8))
            assert data[PAGE_SIZE:] == bytes([block + 2]) * PAGE_SIZE


# -- ends and beginnings --------------------------------------------------------------------


async def test_a_drain_answers_what_was_taken_and_takes_no_more(rig_maker):
    device = Logging(("writev", 0))
    async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(write, rig, 0)
        await until(lambda: device.log)
        nursery.start_soon(rig.front.barrier)
        await until(lambda: rig.disk.connection.in_flight == 2)
        nursery.start_soon(write, rig, PAGE_SIZE)
        await until(lambda: rig.disk.connection.in_flight == 3)
        drained = trio.Event()

        async def disconnect():
            await rig.disk.disconnect(drain=True)
            drained.set()

        nursery.start_soon(disconnect)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.start_soon(write, rig, 2 * PAGE_SIZE)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not drained.is_set()
        device.gate.set()
        with trio.fail_after(10):
            await drained.wait()
        assert device.log == [("writev", 0), ("flush", 0), ("writev", PAGE_SIZE)]
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert rig.front.queues[0].in_flight == 1
        await rig.connect()
    assert device.log[3] == ("writev", 2 * PAGE_SIZE)


@pytest.mark.parametrize("next_path", [PYTHON, NATIVE, NATIVE_PREADV])
async def test_what_a_dead_backend_left_keeps_its_order_and_nothing_waits_for_it(
    rig_maker, next_path, tmp_path
):
    """Whichever data path served before, and whichever follows it."""
    device = Logging(("writev", 0))
    journals = tmp_path / "journal"
    options = FrontendOptions(queues=2)
    with threads_of(next_path) as threads:
        async with (
            rig_maker(device=device, journal_dir=journals, options=options) as rig,
            trio.open_nursery() as nursery,
        ):
            for request in (write, lambda rig, _: rig.front.barrier(), write):
                rig.front._turn = 0
                before = rig.disk.connection.in_flight
                nursery.start_soon(request, rig, PAGE_SIZE * bool(before))
                await until(lambda before=before: rig.disk.connection.in_flight > before)
            await until(lambda: device.log)
            await rig.die(journals)
            device.log.clear()
            rig.disk = rig.make_disk(threads)
            await rig.connect()
            await until(lambda: device.log)
            rig.front._turn = 1
            await write(rig, 2 * PAGE_SIZE)
            assert device.log == [("writev", 0), ("writev", 2 * PAGE_SIZE)]
            device.gate.set()
        assert device.log[2:4] == [("flush", 0), ("writev", PAGE_SIZE)]
        await rig.disk.disconnect(drain=True)
