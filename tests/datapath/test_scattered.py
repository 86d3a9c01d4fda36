"""A disk in many extents, which move while it is in use."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import trio

from xbd.core.datapath import connection, engine
from xbd.core.driver import BlockDevice, Capability, Geometry, HostExtent
from xbd.core.driver.buffers import gather, scatter
from xbd.core.driver.testing import MemoryDevice
from xbd.core.units import KIB, MIB

ENGINES = {"io_uring": engine.UringEngine, "threads": engine.ThreadEngine}
SIZE = 4 * MIB
UNITS = pytest.mark.parametrize("unit", [16 * KIB, 64 * KIB])
"""Smaller than a chunk of the extent cache, and as large."""
CACHES = pytest.mark.parametrize("direct", [False, True], ids=["page cache", "O_DIRECT"])


@pytest.fixture(params=ENGINES)
def engine_name(request, monkeypatch):
    monkeypatch.setattr(connection, "make_engine", ENGINES[request.param])
    return request.param


class MovingDevice(BlockDevice):
    """Units in any order in a file of twice the size.  What nobody may read there is 0xEE."""

    def __init__(self, path, unit, *, direct, seed):
        self._unit = unit
        self._units = SIZE // unit
        path.write_bytes(b"\xee" * SIZE * 2)
        self._plain = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        self._direct = direct
        self._dice = random.Random(seed)
        places = list(range(2 * self._units))
        self._dice.shuffle(places)
        self.places: list[int | None] = list(places[: self._units])
        self._free = places[self._units :]
        self._settled = trio.Event()
        self.calls = 0
        for unit in range(self._units):
            os.pwrite(self._plain, bytes(self._unit), self.places[unit] * self._unit)

    @property
    def geometry(self):
        alignment = 512 if self._direct else 1
        return Geometry(size=SIZE, request_alignment=alignment, memory_alignment=alignment)

    @property
    def capabilities(self):
        return Capability.WRITE | Capability.FLUSH

    def resolve(self, offset, length, *, for_write):
        """As far as was asked."""
        found = []
        while length > 0 and (place := self.places[offset // self._unit]) is not None:
            inside = offset % self._unit
            size = self._unit - inside
            found.append(HostExtent(fd=self.fd, offset=place * self._unit + inside, length=size))
            offset, length = offset + size, length - size
        return found

    async def move(self, access):
        """One unit, as a driver would that compacts its file."""
        unit = self._dice.randrange(self._units)
        old, self.places[unit] = self.places[unit], None
        await access.invalidate(unit * self._unit, self._unit)
        new = self._free.pop(0)
        os.pwrite(
            self._plain, os.pread(self._plain, self._unit, old * self._unit), new * self._unit
        )
        os.pwrite(self._plain, b"\xee" * self._unit, old * self._unit)
        self._free.append(old)
        self.places[unit] = new
        self._settled.set()
        self._settled = trio.Event()

    async def _transfer(self, offset, length, move):
        self.calls += 1
        end = offset + length
        while None in self.places[offset // self._unit : -(-end // self._unit)]:
            await self._settled.wait()
        while offset < end:
            size = min(self._unit - offset % self._unit, end - offset)
            move(offset, size, self.places[offset // self._unit] * self._unit + offset % self._unit)
            offset += size

    async def readv(self, offset, buffers):
        data = bytearray(sum(map(len, buffers)))

        def read(at, size, position):
            data[at - offset : at - offset + size] = os.pread(self._plain, size, position)

        await self._transfer(offset, len(data), read)
        scatter(memoryview(data), buffers)

    async def writev(self, offset, buffers):
        data = bytearray(sum(map(len, buffers)))
        gather(buffers, memoryview(data))

        def write(at, size, position):
            os.pwrite(self._plain, data[at - offset : at - offset + size], position)

        await self._transfer(offset, len(data), write)

    async def flush(self):
        os.fdatasync(self._plain)

    async def aclose(self):
        for fd in {self._plain, self.fd} - {-1}:
            os.close(fd)
        self._plain = self.fd = -1


async def _random_requests(rig, seed, count):
    """Against a model; the requests of one round touch different bytes."""
    dice = random.Random(seed)
    model = bytearray(SIZE)

    async def one(offset, length, write):
        if write:
            data = dice.randbytes(length)
            await rig.front.write(offset, data)
            model[offset : offset + length] = data
        else:
            assert await rig.front.read(offset, length) == model[offset : offset + length]

    for _ in range(count):
        cuts = sorted({512 * dice.randint(0, SIZE // 512) for _ in range(10)})
        async with trio.open_nursery() as nursery:
            for begin, end in itertools.pairwise(cuts):
                length = min(end - begin, dice.choice([4 * KIB, 64 * KIB, 600 * KIB]))
                nursery.start_soon(one, begin, length, dice.random() < 0.5)
    assert await rig.front.read(0, SIZE) == model


@UNITS
@CACHES
async def test_requests_over_many_extents(
    rig_maker, native_threads, tmp_path, engine_name, direct, unit
):
    device = MovingDevice(tmp_path / "disk", unit, direct=direct, seed=1)
    async with rig_maker(device=device) as rig:
        assert f", {engine_name}, " in rig.disk.describe() or native_threads is not None
        await _random_requests(rig, 2, 10)
        assert device.calls == 0  # the engine did it all


@UNITS
@CACHES
async def test_extents_that_move_under_requests(rig_maker, tmp_path, engine_name, direct, unit):
    device = MovingDevice(tmp_path / "disk", unit, direct=direct, seed=3)
    async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:

        async def keep_moving():
            while True:
                await device.move(rig.access)
                await trio.lowlevel.checkpoint()

        nursery.start_soon(keep_moving)
        await _random_requests(rig, 4, 10)
        nursery.cancel_scope.cancel()


async def test_when_a_piece_fails_the_driver_does_it_all_again(rig_maker, tmp_path, engine_name):
    device = MovingDevice(tmp_path / "disk", 64 * KIB, direct=False, seed=5)
    async with rig_maker(device=device) as rig:
        data = random.Random(6).randbytes(256 * KIB)
        await rig.front.write(0, data)
        read_only = os.open(tmp_path / "disk", os.O_RDONLY | os.O_CLOEXEC)
        resolve = device.resolve

        def third_is_read_only(offset, length, *, for_write):
            found = resolve(offset, length, for_write=for_write)
            bad = device.places[2] * 64 * KIB
            return [
                HostExtent(fd=read_only, offset=extent.offset, length=extent.length)
                if bad <= extent.offset < bad + 64 * KIB
                else extent
                for extent in found
            ]

        device.resolve = third_is_read_only
        await rig.access.invalidate(0, SIZE)
        assert await rig.front.read(0, 256 * KIB) == data
        assert device.calls == 0
        data = random.Random(7).randbytes(256 * KIB)
        await rig.front.write(0, data)
        assert device.calls >= 1
        assert await rig.front.read(0, 256 * KIB) == data
        assert rig.disk.stats.errors == 0
        os.close(read_only)


async def test_a_request_in_more_pieces_than_the_io_uring_has_room_for(rig_maker, monkeypatch):
    monkeypatch.setattr(engine, "URING_ENTRIES", 8)
    unit = 16 * KIB
    device = MemoryDevice(SIZE)
    resolve = device.resolve

    def in_units(offset, length, *, for_write):
        """In pairs of units that have changed places."""
        [extent] = resolve(offset ^ unit, length, for_write=for_write)
        return [HostExtent(fd=extent.fd, offset=extent.offset, length=unit - offset % unit)]

    async with rig_maker(device=device) as rig:
        device.resolve = in_units
        data = random.Random(8).randbytes(SIZE)
        async with trio.open_nursery() as nursery:
            for offset in range(0, SIZE, 512 * KIB):
                nursery.start_soon(rig.front.write, offset, data[offset : offset + 508 * KIB])
                small = offset + 508 * KIB
                nursery.start_soon(rig.front.write, small, data[small : small + 4 * KIB])
        assert await rig.front.read(0, SIZE) == data
        content = device.disk.content
        for offset in range(0, SIZE, unit):
            assert content[offset : offset + unit] == data[offset ^ unit :][:unit]


async def test_a_file_that_gets_the_number_of_one_that_was_closed(rig_maker, tmp_path):
    device = MovingDevice(tmp_path / "old", 64 * KIB, direct=False, seed=9)
    async with rig_maker(device=device) as rig:
        old = random.Random(10).randbytes(SIZE)
        await rig.front.write(0, old)
        places, number = device.places, device.fd
        device.places = [None] * len(places)
        await rig.access.invalidate(0, SIZE)
        (tmp_path / "new").write_bytes((tmp_path / "old").read_bytes())
        for fd in (device.fd, device._plain):
            os.close(fd)
        plain = os.open(tmp_path / "new", os.O_RDWR | os.O_CLOEXEC)
        device.fd = os.dup2(plain, number, inheritable=False) if plain != number else plain
        device._plain = plain if plain != number else os.dup(plain)
        device.places = places
        (tmp_path / "old").write_bytes(b"")
        assert await rig.front.read(0, SIZE) == old
        new = random.Random(11).randbytes(SIZE)
        await rig.front.write(0, new)
        assert device.calls == 0
        assert (tmp_path / "old").read_bytes() == b""
        for unit, place in enumerate(places):
            at = place * 64 * KIB
            written = (tmp_path / "new").read_bytes()[at : at + 64 * KIB]
            assert written == new[unit * 64 * KIB :][: 64 * KIB]
