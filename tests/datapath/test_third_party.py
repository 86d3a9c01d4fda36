"""A driver that knows nothing of data paths is as quick as its answers of `resolve` allow: once a
part of the disk was touched, nothing that is read or written there comes to the driver any more."""

from __future__ import annotations

import random
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from sample_packages import CHUNKS, install
from stevedore.extension import ExtensionManager

from xbd.core.driver import DiskSpec, open_disk
from xbd.core.driver.registry import load_driver
from xbd.core.units import KIB, MIB

COUNT = 12
SIZE = COUNT * MIB - 64 * KIB  # the last chunk is not used to its end
LENGTHS = (512, 4 * KIB, 44 * KIB, 128 * KIB, 600 * KIB)


@attrs.define
class Chunks:
    """The sample driver's disk behind a ring, and what the driver is called with."""

    rig: object
    device: object
    directory: Path
    model: bytearray = attrs.Factory(lambda: bytearray(SIZE))
    there: set = attrs.Factory(set)
    """Chunks that have a file."""
    calls: int = 0
    """Of the driver's methods for data."""
    asked: int = 0
    """Of its `resolve`."""
    expected: int = 0
    fds: dict = attrs.Factory(dict)
    """By number of a file: the chunks that it was open for."""

    def watch(self) -> None:
        device = self.device

        def counting(method):
            async def call(offset, buffers):
                self.calls += 1
                await method(offset, buffers)

            return call

        device.readv, device.writev = counting(device.readv), counting(device.writev)
        resolve = device.resolve

        def asking(offset, length, *, for_write):
            self.asked += 1
            return resolve(offset, length, for_write=for_write)

        device.resolve = asking

    def _needs_driver(self, offset: int, length: int) -> bool:
        chunks = range(offset // MIB, (offset + length - 1) // MIB + 1)
        return not self.there.issuperset(chunks)

    async def write(self, offset: int, data: bytes) -> None:
        self.expected += self._needs_driver(offset, len(data))
        await self.rig.front.write(offset, data)
        self.model[offset : offset + len(data)] = data
        for number in range(offset // MIB, (offset + len(data) - 1) // MIB + 1):
            self.there.add(number)
            self.fds.setdefault(self.device._chunks[number], set()).add(number)

    async def read(self, offset: int, length: int) -> None:
        self.expected += self._needs_driver(offset, length)
        data = await self.rig.front.read(offset, length)
        assert data == self.model[offset : offset + length]

    async def discard(self, number: int) -> None:
        """A chunk's file is closed, and its number is free for the next one."""
        length = min(MIB, SIZE - number * MIB)
        await self.rig.front.discard(number * MIB, length)
        self.there.discard(number)
        self.model[number * MIB : number * MIB + length] = bytes(length)

    async def anything(self, dice: random.Random, first: int, last: int) -> None:
        """One request within some chunks."""
        length = dice.choice(LENGTHS)
        end = min(last * MIB, SIZE)
        offset = first * MIB + dice.randrange((end - first * MIB - length) // 512) * 512
        what = dice.random()
        if what < 0.1:
            await self.discard(dice.randrange(first, last))
        elif what < 0.55:
            await self.write(offset, dice.randbytes(length))
        else:
            await self.read(offset, length)

    def check_files(self) -> None:
        """What the driver has on the host, past all data paths."""
        names = {f"{number:08x}" for number in self.there}
        assert {path.name for path in self.directory.iterdir()} == names
        for number in self.there:
            found = (self.directory / f"{number:08x}").read_bytes()
            wanted = self.model[number * MIB : (number + 1) * MIB]
            assert found[: len(wanted)] == wanted


@pytest.fixture
def chunks(rig_maker, tmp_path, monkeypatch):
    """`async with chunks() as disk`: the driver is found as anybody's is."""
    install(CHUNKS, tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "xbd_driver_chunks", raising=False)
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})  # from tests before this one
    load_driver.cache_clear()
    directory = tmp_path / "disk"
    directory.mkdir()

    @asynccontextmanager
    async def make():
        spec = DiskSpec.parse(f"chunks:{directory}?size={SIZE}")
        async with (
            open_disk(spec, device_id="test", writable=True) as access,
            rig_maker(access=access) as rig,
        ):
            disk = Chunks(rig, access.device, directory)
            disk.watch()
            yield disk
            disk.check_files()

    yield make
    load_driver.cache_clear()


async def test_after_the_first_touch_the_driver_is_not_called(chunks):
    async with chunks() as disk:
        for number in range(COUNT):
            await disk.write(number * MIB, b"1" * 4 * KIB)
        assert disk.calls == disk.expected == COUNT
        for number in range(COUNT):  # once for reading, once for writing
            await disk.read(number * MIB, 512)
            await disk.write(number * MIB, b"2" * 4 * KIB)
        assert disk.calls == COUNT
        disk.asked = 0
        dice = random.Random(1)
        for _ in range(300):
            length = dice.choice(LENGTHS)
            offset = dice.randrange((SIZE - length) // 512) * 512
            if dice.random() < 0.5:
                await disk.write(offset, dice.randbytes(length))
            else:
                await disk.read(offset, length)
        assert (disk.calls, disk.asked) == (COUNT, 0)
        assert disk.rig.disk.stats.errors == 0


async def test_requests_that_come_together_ask_once(chunks):
    async with chunks() as disk:
        await disk.write(0, b"1" * MIB)
        disk.asked = 0
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(disk.read, number * 2 * KIB, 4 * KIB)
        assert (disk.calls, disk.asked) == (disk.expected, 1)


async def test_chunks_that_go_and_come_back_in_files_of_the_same_numbers(chunks):
    dice = random.Random(2)
    async with chunks() as disk:
        for _ in range(400):
            await disk.anything(dice, 0, COUNT)
            assert disk.calls == disk.expected
        disk.asked = 0
        for number in sorted(disk.there):
            await disk.read(number * MIB, 512)
            await disk.read(number * MIB, 512)
        assert disk.asked <= len(disk.there)
        assert any(len(numbers) > 3 for numbers in disk.fds.values()), "no number was used again"


async def test_chunks_that_go_and_come_back_while_others_are_in_use(chunks):
    async with chunks() as disk, trio.open_nursery() as nursery:

        async def work(first):
            dice = random.Random(first)
            for _ in range(100):
                await disk.anything(dice, first, first + 3)

        for first in range(0, COUNT, 3):
            nursery.start_soon(work, first)
    assert disk.calls == disk.expected
    assert any(len(numbers) > 1 for numbers in disk.fds.values()), "no number was used again"
