"""Both engines move the same bytes; files that go through the page cache and files that don't."""

from __future__ import annotations

import errno
import os
import random

import pytest
import trio

from xbd.core.datapath import connection, engine
from xbd.core.driver import DiskSpec, open_disk
from xbd.core.units import KIB, MIB

ENGINES = {"io_uring": engine.UringEngine, "threads": engine.ThreadEngine}


@pytest.fixture(params=ENGINES)
def engine_name(request, monkeypatch):
    monkeypatch.setattr(connection, "make_engine", ENGINES[request.param])
    return request.param


@pytest.mark.parametrize("cache", ["none", "writeback"])
async def test_an_image_file_through_both_engines(python_rig_maker, tmp_path, engine_name, cache):
    size = 8 * MIB
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(size))
    spec = DiskSpec.parse(f"imagefile:{image}?cache={cache}")
    dice = random.Random(1)
    model = bytearray(size)
    async with (
        open_disk(spec, device_id="test", writable=True) as access,
        python_rig_maker(access=access) as rig,
    ):
        assert f", {engine_name}, " in rig.disk.describe()

        async def write(offset: int, length: int) -> None:
            data = dice.randbytes(length)
            model[offset : offset + length] = data
            await rig.front.write(offset, data)

        async with trio.open_nursery() as nursery:
            for offset in range(0, size, 256 * KIB):
                nursery.start_soon(write, offset + 512 * dice.randint(0, 200), 150 * KIB)
        for _ in range(2):  # the second time from the page cache, where there is one
            async with trio.open_nursery() as nursery:
                for offset in range(0, size, 64 * KIB):

                    async def check(offset: int = offset) -> None:
                        data = await rig.front.read(offset, 64 * KIB)
                        assert data == model[offset : offset + 64 * KIB]

                    nursery.start_soon(check)
        await rig.front.flush()
    assert image.read_bytes() == bytes(model)


async def test_threads_serve_where_io_uring_is_forbidden(python_rig_maker, monkeypatch):
    def forbidden(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(engine, "IoUring", forbidden)
    async with python_rig_maker() as rig:
        assert rig.disk.describe() == "python, threads, persistent"
        await rig.front.write(0, b"t" * 64 * KIB)
        assert await rig.front.read(0, 64 * KIB) == b"t" * 64 * KIB


async def test_more_requests_than_the_io_uring_has_room_for(python_rig_maker, monkeypatch):
    from xbd.core.frontend import FrontendOptions

    monkeypatch.setattr(engine, "URING_ENTRIES", 8)
    options = FrontendOptions(ring_order=2, queues=2, data_pages=600)
    async with python_rig_maker(options=options) as rig, trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(rig.front.write, number * 4 * KIB, bytes([number]) * 4 * KIB)
    assert rig.device.closed
    assert rig.device.disk.content[: 800 * KIB] == b"".join(
        bytes([number]) * 4 * KIB for number in range(200)
    )
