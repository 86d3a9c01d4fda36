"""I/O past the driver, and taking it back."""

from __future__ import annotations

import errno
import os
import random

import pytest
import trio
import trio.testing
from nbd_client import CACHE, EIO, READ, TRIM, WRITE, Client
from nbd_rig import SIZE, Rig, memory, serving

from xbd.core.driver import Concurrency, DeviceAccess, HostExtent
from xbd.core.driver.testing import MemoryDevice, MemoryDisk, Wrapper
from xbd.core.nbd import server as server_module
from xbd.core.nbd.engine import Engine


class GatedEngine(Engine):
    """Moves what it was given when it is told to."""

    name = "gated"

    def __init__(self, poller) -> None:
        self.queued = []

    def start(self, transfer, fd, offset) -> None:
        self.queued.append((transfer, fd, offset))

    def kick(self) -> None:
        pass

    async def run(self) -> None:
        await trio.sleep_forever()

    @property
    def in_flight(self) -> int:
        return len(self.queued)

    def close(self) -> None:
        assert not self.queued

    def move(self, count: int = 1, *, good: bool = True) -> None:
        for _ in range(count):
            transfer, fd, offset = self.queued.pop(0)
            view = transfer.buffer.view[: transfer.length]
            (os.pwritev if transfer.write else os.preadv)(fd, [view], offset)
            ended = ([transfer], [])
            transfer.owner.completed(*(ended if good else reversed(ended)))


@pytest.fixture
def gated(monkeypatch) -> list[GatedEngine]:
    engines: list[GatedEngine] = []

    def make(poller) -> GatedEngine:
        engines.append(GatedEngine(poller))
        return engines[-1]

    monkeypatch.setattr(server_module, "make_engine", make)
    return engines


async def invalidating(rig: Rig, offset: int, length: int, done: list[int]) -> None:
    await rig.access.invalidate(offset, length)
    done.append(offset)


async def test_an_extent_is_taken_back_when_nothing_uses_it_any_more(gated):
    device = memory()
    async with serving(device) as rig:
        client = await rig.client()
        for block in range(3):
            await client.send(WRITE, block * 4096, data=bytes([block + 1]) * 4096)
        await trio.testing.wait_all_tasks_blocked()
        engine, done = gated[0], []
        assert engine.in_flight == 3
        rig.nursery.start_soon(invalidating, rig, 4096, 4096, done)
        rig.nursery.start_soon(invalidating, rig, 5000, 1, done)
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        await rig.access.invalidate(12288, 4096)
        engine.move()
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        engine.move()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(done) == [4096, 5000]
        engine.move()
        for _ in range(3):
            await client.reply()
        assert device.disk.content[:12288] == b"".join(bytes([n]) * 4096 for n in (1, 2, 3))
        await client.disconnect()


async def test_what_began_after_the_taking_back_is_not_waited_for(gated):
    async with serving() as rig:
        client = await rig.client()
        await client.send(WRITE, 0, data=bytes(4096))
        await trio.testing.wait_all_tasks_blocked()
        done = []
        rig.nursery.start_soon(invalidating, rig, 0, 4096, done)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(WRITE, 0, data=bytes(4096))
        await trio.testing.wait_all_tasks_blocked()
        gated[0].move()
        await trio.testing.wait_all_tasks_blocked()
        assert done == [0]
        gated[0].move()
        await client.reply()
        await client.reply()
        await client.disconnect()


async def test_a_transfer_that_failed_is_not_waited_for_while_the_driver_has_it(gated):
    """Else a driver that takes back inside a method would wait for itself."""
    device = memory()
    async with serving(device) as rig:

        class TakesBack(Wrapper):
            async def writev(self, offset, buffers):
                await rig.access.invalidate(0, SIZE)
                await super().writev(offset, buffers)

        rig.access._device = TakesBack(device)
        client = await rig.client()
        await client.send(WRITE, 0, data=b"x" * 4096)
        await client.send(WRITE, 0, data=b"x" * 4096)
        await trio.testing.wait_all_tasks_blocked()
        gated[0].move(good=False)
        await trio.testing.wait_all_tasks_blocked()
        gated[0].move(good=False)
        for _ in range(2):
            assert not (await client.reply())[1].error
        await client.disconnect()


async def test_a_new_answer_is_used_after_the_old_was_taken_back(engine: str):
    """The disk moves to another file, again and again, and closes the old one."""

    class Moves(Wrapper):
        def __init__(self) -> None:
            super().__init__(memory())
            self.moves = 0

        async def discard(self, extents):
            old, new = self.inner, memory()
            content = memoryview(bytearray(SIZE))
            old.resolve = lambda *_, **__: None  # type: ignore[method-assign]
            await rig.access.invalidate(0, SIZE)
            await old.readv(0, [content])
            await new.writev(0, [content])
            self.inner = new
            await old.aclose()
            self.moves += 1

    device = Moves()
    access = DeviceAccess(
        device, device_id="the disk", concurrency=Concurrency.SERIAL, writable=True
    )
    async with serving(access) as rig:
        clients = [await rig.client() for _ in range(3)]
        dice = random.Random(5)
        model = bytearray(SIZE)
        part = SIZE // 4

        async def use(client: Client, number: int) -> None:
            for _ in range(60):
                offset = number * part + 512 * dice.randrange(part // 512 - 64)
                length = 512 * dice.randint(1, 64)
                if dice.random() < 0.5:
                    data = dice.randbytes(length)
                    await client.write(offset, data)
                    model[offset : offset + length] = data
                else:
                    assert await client.read(offset, length) == model[offset : offset + length]
                if dice.random() < 0.1:
                    assert not (await client.do(TRIM, 3 * part, 4096)).error

        async with trio.open_nursery() as nursery:
            for number, client in enumerate(clients):
                nursery.start_soon(use, client, number)
        assert device.moves > 5
        assert await clients[0].read(0, SIZE) == model
        for client in clients:
            await client.disconnect()


async def test_small_writes_into_one_block_from_all_sides_are_all_kept(engine: str):
    device = memory(geometry={"request_alignment": 4096})
    async with serving(device) as rig:
        clients = [await rig.client() for _ in range(4)]
        model = bytearray(65536)
        await clients[0].write(0, bytes(65536))
        dice = random.Random(3)
        for _ in range(20):
            pieces = [(512 * n, dice.randbytes(512)) for n in dice.sample(range(64), 12)]
            whole = (32768 + 4096 * dice.randrange(8), dice.randbytes(4096))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(clients[3].write, *whole)
                for number, client in enumerate(clients[:3]):
                    nursery.start_soon(write_all, client, pieces[number::3])
            for offset, data in (*pieces, whole):
                model[offset : offset + len(data)] = data
            assert device.disk.content[:65536] == model
        for client in clients:
            await client.disconnect()


async def write_all(client: Client, pieces: list[tuple[int, bytes]]) -> None:
    for offset, data in pieces:
        await client.send(WRITE, offset, data=data)
    for _ in pieces:
        assert not (await client.reply())[1].error


# -- the page cache -----------------------------------------------------------------------------


async def test_reads_that_the_page_cache_has_need_no_engine(gated, monkeypatch):
    real = os.preadv
    # Not every filesystem can do this, and tmpfs can't.
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, _=0: real(fd, buffers, offset))
    async with serving() as rig:
        client = await rig.client()
        assert await client.read(0, 65536) == bytes(65536)
        await client.send(READ, 0, 256 * 1024)
        await trio.testing.wait_all_tasks_blocked()
        assert gated[0].in_flight == 1
        gated[0].move()
        assert (await client.reply())[1].content == bytes(256 * 1024)
        await client.disconnect()


@pytest.mark.parametrize(
    "error",
    [
        BlockingIOError(errno.EAGAIN, "not cached"),
        OSError(errno.EOPNOTSUPP, "not on this filesystem"),
        None,
    ],
)
async def test_reads_that_it_has_not(gated, monkeypatch, error: OSError | None):
    real, asked = os.preadv, []

    def preadv(fd, buffers, offset, flags=0):
        if not flags:
            return real(fd, buffers, offset)
        asked.append(offset)
        if error is not None:
            raise error
        return real(fd, [buffers[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    device = memory()
    os.pwrite(device.disk.fd, b"x" * 512, 0)
    async with serving(device) as rig:
        client = await rig.client()
        for _ in range(2):
            await client.send(READ, 0, 512)
            await trio.testing.wait_all_tasks_blocked()
            gated[0].move()
            assert (await client.reply())[1].content == b"x" * 512
        # What a file can't do at all is not tried again.
        assert len(asked) == (1 if error and error.errno == errno.EOPNOTSUPP else 2)
        await client.disconnect()


async def test_a_descriptors_number_may_come_back_as_another_file():
    """What was found out about a file is forgotten with its extents."""
    device = memory()
    async with serving(device) as rig:
        client = await rig.client()
        await client.read(0, 512)
        direct = rig.server._direct
        fd = device._fd
        direct.never_cached(fd)
        assert not direct.is_cached(fd)
        await rig.access.invalidate(0, 1)
        assert direct.is_cached(fd)
        await client.disconnect()


async def test_failing_advice_fails_that_request(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "bad")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    async with serving() as rig:
        client = await rig.client()
        assert (await client.do(CACHE, 0, 4096)).error == EIO
        await client.disconnect()


# -- odd answers --------------------------------------------------------------------------------


async def test_a_range_that_lies_in_two_files(engine: str):
    """Each file by itself is read and written directly, what crosses the border is not."""

    class Halves(MemoryDevice):
        def __init__(self) -> None:
            super().__init__(MemoryDisk(SIZE))
            self.other = memory()
            self.calls = 0

        def resolve(self, offset, length, *, for_write):
            middle = SIZE // 2
            if offset >= middle:
                return [HostExtent(fd=self.other._fd, offset=offset, length=SIZE - offset)]
            return [
                HostExtent(fd=self._fd, offset=offset, length=middle - offset),
                HostExtent(fd=self.other._fd, offset=middle, length=middle),
            ]

        async def writev(self, offset, buffers):
            self.calls += 1
            data = b"".join(buffers)
            cut = SIZE // 2 - offset
            os.pwrite(self._fd, data[:cut], offset)
            os.pwrite(self.other._fd, data[cut:], SIZE // 2)

    device = Halves()
    async with serving(device) as rig:
        client = await rig.client()
        await client.write(0, b"a" * 4096)
        await client.write(SIZE - 4096, b"b" * 4096)
        assert device.calls == 0
        await client.write(SIZE // 2 - 2048, b"c" * 4096)
        assert device.calls == 1
        assert await client.read(SIZE // 2 - 2048, 2048) == b"c" * 2048
        assert await client.read(SIZE // 2, 2048) == b"c" * 2048
        assert await client.read(SIZE - 4096, 4096) == b"b" * 4096
        await client.disconnect()
    await device.other.aclose()


async def test_without_io_uring_threads_do_it(monkeypatch):
    from xbd.core.nbd import engine as engine_module

    def refuse(entries: int):
        raise OSError(errno.EPERM, "forbidden")

    monkeypatch.setattr(engine_module, "IoUring", refuse)
    async with serving() as rig:
        client = await rig.client()
        await client.write(0, b"x" * 4096)
        assert await client.read(0, 4096) == b"x" * 4096
        await client.disconnect()
