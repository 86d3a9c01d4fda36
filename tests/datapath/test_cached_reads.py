"""What the page cache has is read without the engine, wherever it lies."""

from __future__ import annotations

import os
import random

import pytest

from xbd.core.blkif import X86_64, constants, encode
from xbd.core.datapath import engine
from xbd.core.driver import BlockDevice, Capability, Geometry, HostExtent
from xbd.core.frontend import FrontendOptions
from xbd.core.units import KIB, MIB

SIZE = 4 * MIB


class Spread(BlockDevice):
    """Extents in any order, each in one of several files of the same content."""

    def __init__(self, path, extents, flags):
        """`extents`: bytes of each, in the disk's order."""
        self.content = random.Random(1).randbytes(SIZE)
        self.fds = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)]
        self.fds += [os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag) for flag in flags]
        order = list(range(len(extents)))
        random.Random(2).shuffle(order)
        starts = [sum(extents[:number]) for number in range(len(extents))]
        self._extents = []
        places = {}
        for number in order:
            places[number] = sum(extents[earlier] for earlier in places)
        for number, (start, size) in enumerate(zip(starts, extents, strict=True)):
            os.pwrite(self.fds[0], self.content[start : start + size], places[number])
            fd = self.fds[number % len(self.fds)]
            self._extents.append((start, start + size, fd, places[number]))

    @property
    def geometry(self):
        return Geometry(size=SIZE, request_alignment=512, memory_alignment=512)

    @property
    def capabilities(self):
        return Capability.NONE

    def resolve(self, offset, length, *, for_write):
        for start, end, fd, place in self._extents:
            if start <= offset < end:
                position = place + offset - start
                return [HostExtent(fd=fd, offset=position, length=end - offset)]
        raise AssertionError(f"{offset} is outside the disk")

    async def readv(self, offset, buffers):
        raise AssertionError("everything is resolved")

    async def aclose(self):
        while self.fds:
            os.close(self.fds.pop())


@pytest.fixture
def started(monkeypatch):
    """The transfers that an engine was given."""
    works = []

    def count(name):
        original = getattr(engine.UringEngine, name)

        def counting(self, owner, work, *where):
            works.append(work)
            original(self, owner, work, *where)

        monkeypatch.setattr(engine.UringEngine, name, counting)

    count("start")
    count("start_split")
    return works


@pytest.fixture(autouse=True)
def page_cache_can_be_asked(tmp_path):
    path = tmp_path / "probe"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip(f"the file system of {tmp_path} has no RWF_NOWAIT")


async def read_all(rig, device, size, *, inside=0):
    for offset in range(0, SIZE, size):
        data = await rig.front.read(offset + inside, size - inside)
        assert data == device.content[offset + inside : offset + size]


LAYOUTS = {
    "scattered": [64 * KIB] * 64,
    "small": [16 * KIB] * 256,
    "odd": [512 * (1 + number % 100) for number in range(150)],
    "mixed": [3 * MIB, *[64 * KIB] * 8, 512 * KIB],
}


def layout(name):
    extents = LAYOUTS[name]
    return [*extents, SIZE - sum(extents)] if sum(extents) < SIZE else extents


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("files", [1, 3, 12])
async def test_the_engine_has_nothing_to_do(python_rig_maker, tmp_path, started, name, files):
    device = Spread(tmp_path / "disk", layout(name), [0] * (files - 1))
    async with python_rig_maker(device=device, read_only=True) as rig:
        await rig.front.read(0, 512)  # now it is known that the page cache is used
        del started[:]
        await read_all(rig, device, 4 * KIB)
        assert all(len(_pieces(device, work.request)) > 1 for work in started)
        await read_all(rig, device, 4 * KIB, inside=512)
        await read_all(rig, device, 32 * KIB)  # now all the guest's pages are mapped
        del started[:]
        await read_all(rig, device, 32 * KIB)
        assert all(len(_pieces(device, work.request)) > 1 for work in started)


def _pieces(device, request):
    end = request.offset + request.length
    return [each for each in device._extents if each[0] < end and request.offset < each[1]]


async def test_files_with_and_without_the_page_cache(python_rig_maker, tmp_path, started):
    device = Spread(tmp_path / "disk", layout("scattered"), [os.O_DIRECT])
    os.fsync(device.fds[0])
    async with python_rig_maker(device=device, read_only=True) as rig:
        await read_all(rig, device, 4 * KIB)
        del started[:]
        await read_all(rig, device, 4 * KIB)
        direct = {work.request.offset // (64 * KIB) % 2 for work in started}
        assert direct == {1}
        assert len(started) == SIZE // (4 * KIB) // 2


async def test_every_ring_learns_for_itself(python_rig_maker, tmp_path, started):
    device = Spread(tmp_path / "disk", [SIZE], [])
    options = FrontendOptions(queues=3, data_pages=32, indirect_segments=0)
    async with python_rig_maker(device=device, read_only=True, options=options) as rig:
        await read_all(rig, device, 16 * KIB)  # now each has mapped the guest's pages
        del started[:]
        await read_all(rig, device, 4 * KIB)
        assert started == []


async def test_a_request_over_the_edge_of_a_chunk(python_rig_maker, tmp_path):
    device = Spread(tmp_path / "disk", layout("scattered"), [])
    async with python_rig_maker(device=device, read_only=True) as rig:
        await read_all(rig, device, 4 * KIB)
        [page] = rig.guest.alloc_pages(1)
        rig.guest.grant(page, rig.front.backend)
        for edge in range(64 * KIB, SIZE, 64 * KIB):
            for before in (512, 2048, 3584):
                at = edge - before
                entry = encode.encode_rw(X86_64, constants.READ, 0, at // 512, [(page, 0, 7)])
                status = await rig.front.raw_request(constants.READ, entry)
                assert status == constants.RSP_OKAY
                assert rig.guest.page(page)[:4096] == device.content[at : at + 4096]
