"""I/O through answers of `resolve`, as the data path does it, while everything else goes on."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import pytest
import trio
from qcow2_history import SECTOR, ZEROES, History, Version, stamp
from qcow2_recipes import NAMED, Made
from qcow2_walk import tool

from xbd.core.driver import DeviceAccess, DriverError, Extent, HostExtent, parse_options
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.driver.open import open_device
from xbd.core.units import KIB
from xbd.drivers.qcow2 import DRIVER, refcounts
from xbd.drivers.qcow2.device import Qcow2Device
from xbd.drivers.qcow2.errors import CorruptImage

pytestmark = pytest.mark.usefixtures("no_power_cuts")

TASKS = 4
STEPS = 60
LENGTHS = (8, 8, 16, 40, 128)
"""In sectors: what direct I/O takes."""


@attrs.define(eq=False)
class Answer:
    """What `resolve` said, until it is taken back."""

    offset: int
    extent: HostExtent
    for_write: bool
    users: int = 0
    unused: trio.Event = attrs.field(factory=trio.Event)


class DataPath:
    """Keeps answers, and does I/O through them in threads."""

    def __init__(self, access: DeviceAccess) -> None:
        self.access = access
        self.answers: list[Answer] = []
        self.reads = self.writes = self.taken_back = 0
        access.subscribe(self.invalidate)

    async def invalidate(self, offset: int, length: int) -> None:
        gone = [
            answer
            for answer in self.answers
            if answer.offset < offset + length and offset < answer.offset + answer.extent.length
        ]
        self.answers = [answer for answer in self.answers if answer not in gone]
        self.taken_back += len(gone)
        for answer in gone:
            if answer.users:
                await answer.unused.wait()

    def find(self, offset: int, length: int, *, for_write: bool) -> Answer | None:
        for answer in self.answers:
            end = answer.offset + answer.extent.length
            inside = answer.offset <= offset and offset + length <= end
            if inside and answer.for_write is for_write:
                return answer
        extents = self.access.resolve(offset, length, for_write=for_write)
        if not extents or extents[0].length < length:
            return None
        answer = Answer(offset, extents[0], for_write)
        self.answers.append(answer)
        return answer

    async def transfer(self, offset: int, buffer: memoryview, *, for_write: bool) -> bool:
        answer = self.find(offset, len(buffer), for_write=for_write)
        if answer is None:
            return False
        at = answer.extent.offset + offset - answer.offset
        call = os.pwritev if for_write else os.preadv
        answer.users += 1
        try:
            done = await trio.to_thread.run_sync(call, answer.extent.fd, [buffer], at)
        finally:
            answer.users -= 1
            if not answer.users:
                answer.unused.set()
                answer.unused = trio.Event()
        assert done == len(buffer)
        self.reads += not for_write
        self.writes += for_write
        return True

    async def read(self, offset: int, length: int) -> memoryview:
        buffer = aligned_buffer(length, 4096)
        if not await self.transfer(offset, buffer, for_write=False):
            await self.access.readv(offset, [buffer])
        return buffer

    async def write(self, offset: int, data: bytes) -> None:
        buffer = aligned_buffer(len(data), 4096)
        buffer[:] = data
        if not await self.transfer(offset, buffer, for_write=True):
            await self.access.writev(offset, [buffer])


class Clock:
    """Gives every event a place of its own."""

    def __init__(self) -> None:
        self._now = 0

    def __call__(self) -> int:
        self._now += 1
        return self._now


@attrs.define
class Guest:
    """Changes a part of the disk of its own, and reads anywhere."""

    path: DataPath
    history: History
    clock: Clock
    chance: random.Random
    part: range
    number: int

    def some_range(self, part: range) -> tuple[int, int]:
        length = self.chance.choice(LENGTHS)
        return part.start + 8 * self.chance.randrange((len(part) - length) // 8 + 1), length

    @contextmanager
    def changing(self, first: int, values: list[bytes]) -> Iterator[list[Version]]:
        begun = self.history.begin(first * SECTOR, values, self.clock())
        yield begun
        History.end(begun, self.clock())

    async def step(self, first: int, length: int) -> None:
        """Change it."""
        offset = first * SECTOR
        kind = self.chance.choice("WWWWZUDF")
        access = self.path.access
        if kind == "F":
            await access.flush()
        elif kind == "W":
            self.number += 1
            values = [stamp(self.number, at) for at in range(first, first + length)]
            if self.chance.random() < 0.5:  # it can't be compressed
                values = [self.chance.randbytes(SECTOR) for _ in values]
            with self.changing(first, values):
                await self.path.write(offset, b"".join(values))
        elif kind == "D":
            self.history.begin(offset, [ZEROES] * length, self.clock())
            await access.discard([Extent(offset=offset, length=length * SECTOR)])
            # What is no whole unit may have stayed.
            now = await self.path.read(offset, length * SECTOR)
            values = [bytes(now[at : at + SECTOR]) for at in range(0, len(now), SECTOR)]
            with self.changing(first, values):
                pass
        else:
            with self.changing(first, [ZEROES] * length):
                await access.write_zeroes(offset, length * SECTOR, may_unmap=kind == "U")

    async def look(self, first: int, length: int) -> None:
        """See what is there, or what somebody is just writing."""
        begun = self.clock()
        there = await self.path.read(first * SECTOR, length * SECTOR)
        self.compare(there, first, begun)

    def compare(self, there: bytes | memoryview, first: int, begun: int) -> None:
        """Read since `begun`."""
        now = self.clock()
        for number in range(first, first + len(there) // SECTOR):
            value = there[(number - first) * SECTOR : (number - first + 1) * SECTOR]
            versions = self.history.sectors[number]
            assert bytes(value) in History.allowed(versions, begun, now), (
                f"sector {number} holds {bytes(value[:8]).hex()}, which is not there"
            )

    async def run(self) -> None:
        for _ in range(STEPS):
            place = self.some_range(self.part)
            await self.look(*place)
            await self.step(*place)
            await self.look(*place)
            await self.look(*self.some_range(range(len(self.history.sectors))))


@attrs.frozen
class Shot:
    """A snapshot that was taken between two moments."""

    name: str
    begun: int
    ended: int


@attrs.define
class Manager:
    """Takes snapshots, and makes the disk larger, while guests use it."""

    path: DataPath
    clock: Clock
    can_snapshot: bool
    over: trio.Event = attrs.field(factory=trio.Event)
    shots: list[Shot] = attrs.field(factory=list)

    async def run(self) -> None:
        access = self.path.access
        while not self.over.is_set():
            begun = self.clock()
            await access.resize(access.geometry.size + 64 * KIB)
            if self.can_snapshot and len(self.shots) < 20:
                name = f"shot-{len(self.shots)}"
                begun = self.clock()
                await access.create_snapshot(name)
                self.shots.append(Shot(name, begun, self.clock()))
            await trio.sleep(0.05)


@asynccontextmanager
async def opened(made: Made, **texts: str) -> AsyncIterator[DataPath]:
    options = parse_options(DRIVER.options, {"path": str(made.path), **texts})
    opening = open_device(
        lambda context: DRIVER.open(context, options),
        name=str(made.path),
        concurrency=DRIVER.concurrency,
        device_id="xbdback1i2",
        writable=True,
        image_dirs=[made.path.parent],
    )
    async with opening as access:
        yield DataPath(access)
        assert not access.bugs


def image_of(path: DataPath) -> Qcow2Device:
    device = path.access.device
    assert isinstance(device, Qcow2Device)
    return device


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("4k", "cache=none"),
        ("4k", "cache=writeback"),
        ("4k", "cache=writeback compress=yes"),
        ("over-two", "cache=none"),
        ("snapshots", "cache=writeback"),
        ("subclusters-over-two", "cache=none"),
        ("external-4k", "cache=none"),
    ],
)
async def test_many_guests(
    tmp_path: Path, name: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "writeback" in options:  # what is free is used again at once
        monkeypatch.setattr(refcounts, "FIRST_RUN", 1)
        monkeypatch.setattr(refcounts, "LONGEST_RUN", 1)
    recipe = NAMED[name]
    made = attrs.evolve(recipe, size=256 * KIB).make(tmp_path)
    history, clock = History(made.content), Clock()
    sectors = len(history.sectors)
    told = dict(option.split("=") for option in options.split())
    async with opened(made, **told) as path:
        manager = Manager(path, clock, can_snapshot=not recipe.external)
        guests = [
            Guest(
                path,
                history,
                clock,
                random.Random(f"{name} {task}"),
                range(sectors * task // TASKS, sectors * (task + 1) // TASKS),
                task + 1 << 20,
            )
            for task in range(TASKS)
        ]
        async with trio.open_nursery() as managing:
            if not recipe.external:
                managing.start_soon(manager.run)
            async with trio.open_nursery() as nursery:
                for guest in guests:
                    nursery.start_soon(guest.run)
            manager.over.set()
        assert path.reads
        assert path.writes
        assert path.taken_back
        size = path.access.geometry.size
    made.content[:] = history.content(sectors) + bytes(size - sectors * SECTOR)
    made.agree()
    for shot in manager.shots:
        flat = tmp_path / "then"
        then = ("-l", f"snapshot.name={shot.name}")
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *then, made.path, flat)
        content = flat.read_bytes()
        assert not content[sectors * SECTOR :].strip(b"\0")
        for number, versions in enumerate(history.sectors):
            value = content[number * SECTOR : (number + 1) * SECTOR]
            assert value in History.allowed(versions, shot.begun, shot.ended), (shot, number)


@pytest.mark.parametrize("unmap", [True, False])
async def test_what_is_in_use_is_not_used_for_anything_else(tmp_path: Path, unmap: bool) -> None:
    """While a transfer is under way in a cluster that is given up, nobody else gets that."""
    made = NAMED["4k"].make(tmp_path)
    old, new = b"\x11" * 4096, b"\x22" * 4096
    async with opened(made, cache="writeback") as path:
        access, counts = path.access, image_of(path).image.refcounts
        await path.write(0, old)
        answer = path.find(0, 4096, for_write=True)
        assert answer is not None
        cluster = answer.extent.offset // 4096
        answer.users += 1
        async with trio.open_nursery() as nursery:
            if unmap:
                give_up = [Extent(offset=0, length=4096)]
                nursery.start_soon(access.discard, give_up)
            else:
                nursery.start_soon(lambda: access.write_zeroes(0, 4096, may_unmap=True))
            try:
                with trio.fail_after(20):
                    while not path.taken_back:
                        await access.flush()
                for at in range(4096, made.size, 4096):
                    await path.write(at, new)
                await access.flush()
                assert os.pread(answer.extent.fd, 4096, answer.extent.offset) == old
                assert counts.get(cluster) == 1
            finally:
                answer.users -= 1
                answer.unused.set()
        await access.flush()
        assert counts.get(cluster) == 0
    made.content[4096:] = b"\x22" * (made.size - 4096)
    made.agree()


@pytest.mark.parametrize("how", ["write", "discard", "flush"])
async def test_nothing_is_written_any_more_once_the_image_is_corrupt(
    tmp_path: Path, how: str
) -> None:
    made = NAMED["4k"].make(tmp_path)
    async with opened(made, cache="writeback") as path:
        access, image = path.access, image_of(path).image
        await path.write(0, b"\x11" * 4096)
        await path.write(8192, b"\x11" * 4096)
        assert path.find(0, 4096, for_write=True)
        if how == "flush":  # a cluster that nobody uses is given up
            image.refcounts.release([image.refcounts.end + 100])
        else:
            entry = image.tables.l2(0)
            assert entry is not None
            entry[2] = image.header.l1_table_offset | (1 << 63)
        calls: dict[str, Callable[[], Awaitable[None]]] = {
            "write": lambda: access.writev(8192, [memoryview(bytearray(4096))]),
            "discard": lambda: access.discard([Extent(offset=8192, length=4096)]),
            "flush": access.flush,
        }
        with pytest.raises(CorruptImage):
            await calls[how]()
        assert not path.answers
        assert path.find(0, 4096, for_write=True) is None
        assert path.find(0, 4096, for_write=False)
        with pytest.raises(DriverError, match="not written any more"):
            await access.writev(0, [memoryview(bytearray(4096))])
