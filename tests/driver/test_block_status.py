"""Drivers that tell of holes: true answers pass the conformance suite, false ones don't."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from manuals_driver import chunks_with

from xbd.core.driver import BlockDevice, BlockStatus, OpenContext
from xbd.core.driver.testing import MemoryDevice, MemoryDisk, Wrapper, check_block_device
from xbd.core.driver.testing.bench import Bench
from xbd.core.driver.testing.checks_basic import check_block_status


def maker(wrap: Callable[[MemoryDevice], BlockDevice]) -> Any:
    memory = MemoryDisk(256 << 10)

    @asynccontextmanager
    async def make(context: OpenContext) -> AsyncIterator[BlockDevice]:
        device = wrap(MemoryDevice(memory, writable=context.writable))
        yield device
        await device.aclose()

    return make


class SaysZeroEverywhere(Wrapper):
    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        return [BlockStatus(length=length, hole=True, zero=True)]


class TakesDiscardedForZero(Wrapper):
    """What was discarded reads as 0xDD on this disk."""

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        content = bytearray(512)
        await self.readv(offset, [memoryview(content)])
        zero = not any(content) or content == b"\xdd" * 512
        return [BlockStatus(length=512, hole=zero, zero=zero)]


class GoesBeyondTheEnd(Wrapper):
    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        return [BlockStatus(length=1 << 40, hole=False, zero=False)]


class SaysNothing(Wrapper):
    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        return []


class SaysNothingOfIt(Wrapper):
    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        return [
            BlockStatus(length=0, hole=True, zero=True),
            BlockStatus(length=length, hole=False, zero=False),
        ]


@pytest.mark.parametrize(
    ("wrap", "why"),
    [
        (SaysZeroEverywhere, "zeroes are told"),
        (TakesDiscardedForZero, "zeroes are told"),
        (GoesBeyondTheEnd, "more than the disk has"),
        (SaysNothing, "nothing is told"),
        (SaysNothingOfIt, "empty range"),
    ],
)
async def test_false_answers_are_caught(wrap: Callable[[MemoryDevice], Wrapper], why: str) -> None:
    with pytest.raises(AssertionError, match=why) as caught:
        await check_block_device(maker(wrap), examples=1)
    assert any("check 'block_status'" in note for note in caught.value.__notes__)


async def test_the_memory_disk_tells_of_its_holes() -> None:
    device = MemoryDevice(1 << 20)
    await device.writev(65536, [memoryview(b"x" * 4096)])
    told = await device.block_status(0, 1 << 20)
    assert [(status.length, status.hole, status.zero) for status in told] == [
        (65536, True, True),
        (4096, False, False),
        ((1 << 20) - 69632, True, True),
    ]
    await device.aclose()


async def test_the_manuals_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_with(monkeypatch, "status", "block_status")
    options = chunks.Options(path=tmp_path, size=(3 << 20) + 512)
    bench = Bench(lambda context: chunks.open_chunks(context, options), chunks.DRIVER.concurrency)
    await check_block_status(bench)
    async with bench.open() as access:
        await access.writev(chunks.CHUNK, [memoryview(b"x" * 512)])
        told = await access.block_status(0, options.size)
        first, rest = told[0].length, told[-1].length
        assert [status.zero for status in told] in ([True, False, True], [False, True])
        assert (first, rest) in ((1 << 20, (1 << 20) + 512), (2 << 20, (1 << 20) + 512))
