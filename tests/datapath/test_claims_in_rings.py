"""Rings whose first writes find places by themselves, in a table that the driver has lent."""

from __future__ import annotations

import os
import sys
from array import array
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from data_paths import NATIVE, NATIVE_PREADV

from xbd.core.driver import Capability, Geometry, HostExtent
from xbd.core.driver.api import Concurrency
from xbd.core.driver.open import open_device
from xbd.core.driver.testing import MemoryDevice
from xbd.core.units import KIB, MIB, PAGE_SIZE

UNIT = 64 * KIB
SIZE = 4 * MIB
UNITS = SIZE // UNIT
BITS = 1 << 62

pytestmark = pytest.mark.parametrize("native_threads", [NATIVE, NATIVE_PREADV], indirect=True)


class Lending(MemoryDevice):
    """Each unit lies elsewhere, behind the disk, when it was written to; then it resolves."""

    def __init__(self) -> None:
        super().__init__(SIZE, geometry=Geometry(size=SIZE, request_alignment=PAGE_SIZE))
        self.store = os.memfd_create("store")
        self.table = os.memfd_create("table")
        for fd in (self.store, self.table):
            os.truncate(fd, 3 * SIZE)
        self.entries = array("Q", bytes(8 * UNITS))
        self.free = list(range(2 * UNITS, UNITS, -1))
        self.context = None
        self.calls = 0
        self.begun = False
        self.held: trio.Event | None = None

    def resolve(self, offset, length, *, for_write):
        unit, start = divmod(offset, UNIT)
        if not self.entries[unit]:
            return None
        at = (self.entries[unit] ^ BITS) + start
        return [HostExtent(fd=self.store, offset=at, length=UNIT - start)]

    def can_place(self, offset, length):
        return not all(self.entries[offset // UNIT : (offset + length - 1) // UNIT + 1])

    async def place(self, extents):
        self.calls += 1
        claims = self.context.claims()
        claims.take_back(0)
        for extent in extents:
            last = (extent.offset + extent.length - 1) // UNIT
            for unit in range(extent.offset // UNIT, last + 1):
                self.enter(unit)
        if not self.begun:
            claims.begin(self.store, self.table, UNIT, BITS)
            claims.supply([place * UNIT for place in self.free])
            self.begun = True
        claims.lend(0, self.entries, 0)

    def enter(self, unit):
        if not self.entries[unit]:
            self.entries[unit] = self.free.pop() * UNIT | BITS
            os.pwrite(self.table, self.entries[unit].to_bytes(8, "big"), 8 * unit)

    async def readv(self, offset, buffers):
        if self.held is not None:
            await self.held.wait()
        for buffer in buffers:
            unit, start = divmod(offset, UNIT)
            entry = self.entries[unit]
            part = os.pread(self.store, len(buffer), (entry ^ BITS) + start) if entry else None
            buffer[:] = part or bytes(len(buffer))
            offset += len(buffer)

    async def writev(self, offset, buffers):
        for buffer in buffers:
            unit, start = divmod(offset, UNIT)
            self.context.claims().take_back(0)
            self.enter(unit)
            os.pwrite(self.store, buffer, (self.entries[unit] ^ BITS) + start)
            offset += len(buffer)

    def in_file(self):
        words = array("Q", os.pread(self.table, 8 * UNITS, 0))
        if sys.byteorder == "little":
            words.byteswap()
        return words

    async def create_snapshot(self, name):
        self.held = trio.Event()
        await self.held.wait()

    async def aclose(self):
        for fd in (self.store, self.table):
            os.close(fd)
        await super().aclose()


@asynccontextmanager
async def lending_rig(rig_maker):
    device = Lending()

    @asynccontextmanager
    async def make(context):
        device.context = context
        yield device

    opening = open_device(
        make, name="test", concurrency=Concurrency.PARALLEL, device_id="d", writable=True
    )
    async with opening as access, rig_maker(access=access) as rig:
        yield rig, device
        device.context.claims().end()


def content(number, length=PAGE_SIZE):
    return number.to_bytes(2, "big") * (length // 2)


async def test_first_writes_do_without_the_driver(rig_maker):
    async with lending_rig(rig_maker) as (rig, device):
        await rig.front.write(0, content(1))
        assert device.calls == 1
        async with trio.open_nursery() as nursery:
            for unit in range(1, UNITS):
                nursery.start_soon(rig.front.write, unit * UNIT + PAGE_SIZE, content(unit))
        assert device.calls == 1
        assert all(device.entries)
        assert len(set(device.entries)) == UNITS
        assert device.entries == device.in_file()
        for unit in range(1, UNITS):
            read = await rig.front.read(unit * UNIT, 3 * PAGE_SIZE)
            assert read == bytes(PAGE_SIZE) + content(unit) + bytes(PAGE_SIZE)


async def test_requests_that_need_many_places(rig_maker):
    async with lending_rig(rig_maker) as (rig, device):
        await rig.front.write(0, content(1))
        whole = b"".join(content(unit, UNIT) for unit in range(16))
        await rig.front.write(UNIT // 2, whole)
        assert device.calls == 1
        assert await rig.front.read(UNIT // 2, len(whole)) == whole
        assert device.entries == device.in_file()


async def test_a_table_that_was_taken_back_is_the_drivers(rig_maker):
    async with lending_rig(rig_maker) as (rig, device):
        await rig.front.write(0, content(1))
        device.context.claims().take_back(0)
        await rig.front.write(UNIT, content(2))
        assert device.calls == 2
        await rig.front.write(2 * UNIT, content(3))
        assert device.calls == 2


async def test_without_places_the_driver_finds_some(rig_maker):
    async with lending_rig(rig_maker) as (rig, device):
        del device.free[3:]
        await rig.front.write(0, content(0))
        assert len(device.free) == 2
        for unit in range(1, 3):
            await rig.front.write(unit * UNIT, content(unit))
        assert device.calls == 1
        device.free[:] = [3 * UNITS - 1]
        await rig.front.write(3 * UNIT, content(3))
        assert device.calls == 2
        for unit in range(4):
            assert await rig.front.read(unit * UNIT, PAGE_SIZE) == content(unit)


async def until_held(device):
    with trio.fail_after(10):
        while device.held is None or not device.held.statistics().tasks_waiting:
            await trio.lowlevel.checkpoint()


async def test_nothing_is_claimed_while_a_block_is_read_and_written_again(rig_maker):
    """Else what is written there meanwhile would be lost."""
    async with lending_rig(rig_maker) as (rig, device):
        await rig.front.write(0, content(1))
        device.held = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.front.write, UNIT + 512, content(2, 512))
            await until_held(device)
            before = device.calls
            await rig.front.write(5 * UNIT, content(3))
            assert device.calls == before + 1
            device.held.set()
        device.held = None
        await rig.front.write(6 * UNIT, content(4))
        await rig.front.write(7 * UNIT, content(4))
        assert device.calls == before + 2
        assert await rig.front.read(UNIT + 512, 512) == content(2, 512)


async def test_nothing_is_claimed_while_a_snapshot_is_taken(rig_maker):
    async with lending_rig(rig_maker) as (rig, device):
        assert Capability.SNAPSHOT in rig.access.capabilities
        await rig.front.write(0, content(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.access.create_snapshot, "s")
            await until_held(device)
            nursery.start_soon(rig.front.write, 5 * UNIT, content(3))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not device.entries[5]
            device.held.set()
        device.held = None
        assert device.entries[5]
        assert await rig.front.read(5 * UNIT, PAGE_SIZE) == content(3)
