"""Clusters that move while answers of `resolve` about them are in use."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from qcow2_walk import tool

from xbd.core.driver import BlockDevice, Extent, OpenContext, WriteRequest, parse_options
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import DRIVER
from xbd.drivers.qcow2.moved import Moved
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.writing import Writer

pytestmark = pytest.mark.usefixtures("no_power_cuts")

CLUSTER = 64 * KIB
SIZE = 2 * MIB + 12 * KIB
PAGE = 4 * KIB


@attrs.define
class Core:
    """What the device asks of it."""

    invalidated: list[tuple[int, int]] = attrs.field(factory=list)
    held: trio.Event | None = None
    """Nobody forgets anything before this."""

    async def invalidate(self, offset: int, length: int) -> None:
        self.invalidated.append((offset, offset + length))
        if self.held is not None:
            await self.held.wait()

    def has_forgotten(self, start: int, end: int) -> bool:
        return any(first <= start and end <= last for first, last in self.invalidated)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "raw").write_bytes(b"base" * (SIZE // 4))
    tool(
        *("qemu-img", "create", "-f", "qcow2", "-F", "raw"),
        *("-b", tmp_path / "raw", tmp_path / "over"),
    )
    return tmp_path / "over"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[tuple[BlockDevice, Core]]:
    core = Core()
    context = OpenContext(
        device_id="test",
        writable=True,
        run_blocking=trio.to_thread.run_sync,
        invalidate=core.invalidate,
        image_dirs=[path.parent],
    )
    options = parse_options(DRIVER.options, {"path": str(path), "discard": "unmap"})
    async with DRIVER.open(context, options) as device:
        yield device, core


async def write(device: BlockDevice, offset: int, byte: bytes = b"w") -> None:
    buffer = aligned_buffer(PAGE, PAGE)
    buffer[:] = byte * PAGE
    await device.writev(offset, [buffer])


@pytest.mark.parametrize("may_unmap", [False, True])
async def test_all_of_a_cluster_moves_when_some_of_it_is_zeroed(path: Path, may_unmap: bool):
    async with opened(path) as (device, core):
        await device.write_zeroes(3 * CLUSTER + PAGE, PAGE, may_unmap=may_unmap)
        assert device.resolve(3 * CLUSTER, CLUSTER, for_write=True)
        assert core.has_forgotten(3 * CLUSTER, 4 * CLUSTER)


async def test_the_last_cluster_moves_when_the_disk_grows(path: Path):
    """What lies behind is not its content, but zeroes are."""
    os.truncate(path.with_name("raw"), 3 * MIB)
    with path.with_name("raw").open("r+b") as raw:
        raw.write(b"base" * (3 * MIB // 4))
    async with opened(path) as (device, core):
        await device.resize(SIZE + MIB)
        assert device.resolve(2 * MIB, PAGE, for_write=True)
        assert core.has_forgotten(2 * MIB, 2 * MIB + CLUSTER)


async def held_back(nursery: trio.Nursery, core: Core) -> trio.Event:
    """When somebody waits until others have forgotten."""
    while not core.invalidated:
        await trio.testing.wait_all_tasks_blocked(0.001)
    assert core.held is not None
    return core.held


async def test_nobody_is_answered_before_all_know_where_a_cluster_is(path: Path):
    """Else reading after that would give what was there before."""
    async with opened(path) as (device, core):
        core.held = trio.Event()
        answered = []

        async def write_and_tell(offset: int) -> None:
            await write(device, offset)
            answered.append(offset)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_and_tell, CLUSTER)
            held = await held_back(nursery, core)
            assert device.resolve(CLUSTER, PAGE, for_write=False)
            assert not device.resolve(CLUSTER, PAGE, for_write=True)
            count = len(core.invalidated)
            nursery.start_soon(write_and_tell, CLUSTER + PAGE)
            while len(core.invalidated) == count:
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert not answered
            core.held = None
            held.set()
        assert sorted(answered) == [CLUSTER, CLUSTER + PAGE]
        assert device.resolve(CLUSTER, PAGE, for_write=True)


@pytest.mark.parametrize("zero", [False, True])
async def test_who_writes_to_what_is_given_up_waits_too(path: Path, zero: bool):
    async with opened(path) as (device, core):
        await write(device, CLUSTER)
        core.invalidated.clear()
        core.held = trio.Event()

        async def give_up() -> None:
            if zero:
                await device.write_zeroes(CLUSTER, CLUSTER, may_unmap=True)
            else:
                await device.discard([Extent(offset=CLUSTER, length=CLUSTER)])

        answered = trio.Event()

        async def write_and_tell() -> None:
            await write(device, CLUSTER, b"n")
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            held = await held_back(nursery, core)
            count = len(core.invalidated)
            nursery.start_soon(write_and_tell)
            while len(core.invalidated) == count:
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert not answered.is_set()
            core.held = None
            held.set()
        extents = device.resolve(CLUSTER, PAGE, for_write=True)
        assert extents


def test_who_moves_again_has_to_be_forgotten_again() -> None:
    moved = Moved()
    moved.note([3, 4])
    stamp = moved.stamp
    moved.note([4])
    moved.settled(0, 10, stamp)
    assert 3 not in moved
    assert 4 in moved
    assert (moved.first(0, 10), moved.first(5, 10)) == (4, 10)
    moved.settled(0, 4, moved.stamp)
    assert 4 in moved
    moved.settled(0, 10, moved.stamp)
    assert 4 not in moved


def test_what_is_forgotten_during_a_move_has_to_be_forgotten_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may have looked before the table was changed."""
    image = open_image(path, Wishes(writable=True, image_dirs=[path.parent]))
    moved = image.moved = Moved()
    change = image.tables.change

    def forgotten_first(index: int, words: Mapping[int, int]) -> None:
        assert 3 in moved
        moved.settled(0, 1000, moved.stamp)
        change(index, words)

    monkeypatch.setattr(image.tables, "change", forgotten_first)
    Writer(image).write([WriteRequest(3 * CLUSTER, [memoryview(bytearray(PAGE))])])
    assert 3 in moved
    image.close()


def test_moves_in_threads_while_others_look() -> None:
    moved, count = Moved(), 3000

    def move() -> None:
        for cluster in range(count):
            moved.note([cluster])

    threads = [threading.Thread(target=move) for _ in range(2)]
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(1)  # which lets others run in the middle of things
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            stamp = moved.stamp
            assert 0 <= moved.first(0, count) <= count
            moved.settled(0, count, stamp)
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        for thread in threads:
            thread.join()
    moved.settled(0, count, moved.stamp)
    assert moved.first(0, count) == count
