"""Checks that a device keeps its word when users are rude: cancellation, races, full storage."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final

import trio
import trio.testing

from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.api import Capability, Extent
from xbd.core.driver.geometry import request_unit
from xbd.core.driver.testing.bench import Bench, can, noise, read, span, write
from xbd.core.errors import NoSpace

_ROUNDS: Final = 6
"""After how many turns of the scheduler calls are cancelled, at most."""

_SCRIBBLE: Final = b"\xa5"


async def check_kept_buffers(bench: Bench) -> None:
    """No buffer is touched or looked at any more once a call has returned."""
    async with bench.open() as access:
        size = span(access)
        target = bytearray(size)
        await access.readv(0, [memoryview(target)])
        target[:] = _SCRIBBLE * size
        if can(access, Capability.WRITE):
            source = bytearray(noise(size, 10))
            await access.writev(0, [memoryview(source)])
            source[:] = _SCRIBBLE * size
            await access.flush()
            assert await read(access, 0, size) == noise(size, 10), "a written buffer was kept"
        await read(access, 0, size)
        assert target == _SCRIBBLE * size, "a buffer was filled after the read had returned"


async def check_cancelled_reads(bench: Bench) -> None:
    """A cancelled read leaves its buffers alone, and the device goes on."""
    async with bench.open() as access:
        size = span(access)
        whole = await read(access, 0, size)
        for rounds in range(-1, _ROUNDS):
            target = bytearray(size)
            view = memoryview(target)
            if not await _cancelled(rounds, lambda view=view: access.readv(0, [view])):  # type: ignore[misc]
                assert target == whole, "a read that was not cancelled did not read"
            target[:] = _SCRIBBLE * size
            assert await read(access, 0, size) == whole
            assert target == _SCRIBBLE * size, "a buffer was filled after its read was cancelled"


async def check_cancelled_changes(bench: Bench) -> None:
    """After a cancelled write each block is old or new, and later nothing changes any more."""
    async with bench.open() as access:
        if not can(access, Capability.WRITE):
            return
        size, block = span(access), access.geometry.logical_block
        old, new = noise(size, 11), noise(size, 12)
        for rounds in range(-1, _ROUNDS):
            for name, change, result in _changes(access, size, new):
                await write(access, 0, old)
                done = not await _cancelled(rounds, change)
                got = await read(access, 0, size)
                for at in range(0, size, block):
                    part = slice(at, at + block)
                    fine = got[part] == result[part] or (not done and got[part] == old[part])
                    # What was being discarded may be anything.
                    assert fine or name == "discard", f"{name}, cancelled: block at {at} is torn"
                await access.flush()
                assert await read(access, 0, size) == got or name == "discard", (
                    f"{name} went on after it was cancelled"
                )


def _changes(
    access: DeviceAccess, size: int, new: bytes
) -> list[tuple[str, Callable[[], Awaitable[object]], bytes]]:
    """Ways to change the whole span, and what it is afterwards."""

    async def scribbling_write() -> None:
        buffer = bytearray(new)
        try:
            await access.writev(0, [memoryview(buffer)])
        finally:
            buffer[:] = _SCRIBBLE * size

    extents = [Extent(offset=0, length=size)]
    ways: list[tuple[str, Callable[[], Awaitable[object]], bytes]] = [
        ("write", scribbling_write, new),
        ("zeroes", lambda: access.write_zeroes(0, size, may_unmap=True), bytes(size)),
    ]
    if can(access, Capability.DISCARD):
        ways.append(("discard", lambda: access.discard(extents), bytes(size)))
    return ways


async def check_cancelled_flush(bench: Bench) -> None:
    """A cancelled flush does no harm."""
    async with bench.open() as access:
        for rounds in range(-1, _ROUNDS):
            await _cancelled(rounds, access.flush)
        await access.flush()
        await read(access, 0, span(access))


async def _cancelled(rounds: int, call: Callable[[], Awaitable[object]]) -> bool:
    """Cancel the call after so many turns of the scheduler (-1: when all tasks wait)."""
    finished = False

    async def run() -> None:
        nonlocal finished
        await call()
        finished = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        if rounds < 0:
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(rounds):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    return not finished


async def check_parallel(bench: Bench) -> None:
    """Overlapping reads and writes at once: each block is what one of the last writers wrote."""
    async with bench.open() as access:
        if not can(access, Capability.WRITE):
            return
        blocks = min(span(access) // access.geometry.logical_block, 32)
        for turn in range(12):
            await _parallel_turn(access, blocks, turn)


async def _parallel_turn(access: DeviceAccess, blocks: int, turn: int) -> None:
    block = access.geometry.logical_block
    last: list[dict[int, bytes]] = [{0: bytes(block)} for _ in range(blocks)]
    await write(access, 0, bytes(blocks * block))

    async def worker(number: int) -> None:
        chance = random.Random(turn * 100 + number)
        for step in range(4):
            first = chance.randrange(blocks)
            count = chance.randint(1, min(blocks - first, 6))
            if chance.random() < 0.2:
                await read(access, first * block, count * block)
                continue
            stamp = bytes([number, step]) * (block // 2)
            await write(access, first * block, stamp * count)
            for at in range(first, first + count):
                last[at].pop(0, None)
                last[at][number] = stamp

    async with trio.open_nursery() as nursery:
        for number in range(1, 9):
            nursery.start_soon(worker, number)
    content = await read(access, 0, blocks * block)
    for at, stamps in enumerate(last):
        got = content[at * block : (at + 1) * block]
        assert got in stamps.values(), f"after parallel writes block {at} is nobody's last write"


async def check_no_space(bench: Bench) -> None:
    """When the storage is full, writes raise NoSpace, and all that was written stays."""
    if bench.make_full is None:
        return
    async with bench.open(make=bench.make_full) as access:
        unit = max(request_unit(access.geometry), 4096)
        written = 0
        full = False
        while written + unit <= access.geometry.size and not full:
            try:
                await write(access, written, noise(unit, written))
                written += unit
            except NoSpace:
                full = True
        assert full, "make_full gave a disk that never runs out of space"
        assert written, "make_full gave a disk with no space at all"
        for at in range(0, written, unit):
            assert await read(access, at, unit) == noise(unit, at), "written data was lost"
        await write(access, 0, noise(unit, 13))
        await access.flush()
        assert await read(access, 0, unit) == noise(unit, 13), "no overwriting on a full disk"
