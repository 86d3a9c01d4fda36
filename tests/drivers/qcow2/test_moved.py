"""Clusters that move while answers of `resolve` about them are in use."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from qcow2_walk import tool

from xbd.core.driver import BlockDevice, Extent, OpenContext, parse_options
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import DRIVER

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
