"""Copying disks: the copy is the same, and nothing is written that need not be."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.driver import BlockDevice, BlockStatus, Concurrency, DeviceAccess, Geometry, convert
from xbd.core.driver.convert import CHUNK, Copier
from xbd.core.driver.testing import MemoryDevice, RecordingDevice, WriteLog
from xbd.core.driver.testing.faults import Fault, FaultDevice
from xbd.core.driver.testing.recording import Flush, Write
from xbd.core.driver.testing.wrapper import Wrapper
from xbd.core.errors import DriverError
from xbd.core.units import KIB, MIB

UNIT = 64 * KIB


def access(device: BlockDevice) -> DeviceAccess:
    return DeviceAccess(device, device_id="disk", concurrency=Concurrency.PARALLEL, writable=True)


def disk(content: bytes | bytearray, **geometry: int) -> MemoryDevice:
    """A disk with holes for zeroes."""
    device = MemoryDevice(len(content), geometry=Geometry(size=len(content), **geometry))
    for at in range(0, len(content), 4096):
        if any(content[at : at + 4096]):
            os.pwrite(device.disk.fd, content[at : at + 4096], at)
    return device


def some_content(rng: random.Random, size: int) -> bytearray:
    """Runs of data and of zeroes, of all lengths and at all places."""
    content = bytearray(size)
    at = 0
    while at < size:
        length = min(rng.choice([512, 4096, 60 * KIB, UNIT, 200 * KIB]), size - at)
        if rng.random() < 0.5:
            content[at : at + length] = rng.randbytes(length)
        at += length + rng.choice([0, 512, 4096, UNIT, 200 * KIB])
    return content


@given(
    seed=st.integers(0, 1 << 32),
    size=st.sampled_from([512, UNIT, 512 * KIB, 700 * KIB + 512]),
    granularity=st.sampled_from([0, 4096, UNIT, 128 * KIB, 3 * KIB]),
    mode=st.sampled_from(["over", "zero", "compare"]),
    spare=st.sampled_from([0, UNIT]),
)
async def test_the_copy_is_the_same(
    seed: int, size: int, granularity: int, mode: str, spare: int
) -> None:
    rng = random.Random(seed)
    content = some_content(rng, size)
    there = bytearray(size + spare)
    if mode != "zero":
        there[:] = some_content(rng, size + spare)
    if mode == "compare":
        for at in (rng.randrange(0, size, 512) for _ in range(3)):
            stop = min(at + 200 * KIB, size)
            there[at:stop] = content[at:stop]
    target = disk(there, discard_granularity=granularity)
    log = WriteLog()
    told: list[tuple[int, int]] = []
    # Small ones, so that small disks have several.
    small = {"CHUNK": 128 * KIB, "_SMALLEST_WINDOW": 256 * KIB}
    with patch.multiple(convert, **small):
        await Copier(
            access(disk(content)),
            access(RecordingDevice(target, log)),
            target_is_zero=mode == "zero",
            compare=mode == "compare",
            progress=lambda done, total: told.append((done, total)),
        ).run()
    assert target.disk.content[:size] == content
    assert target.disk.content[size:] == there[size:]
    assert isinstance(log.entries[-1], Flush)
    assert told == sorted(told)
    assert told[0] == (0, size)
    assert told[-1] == (size, size)
    for write in log.entries:
        if isinstance(write, Write) and mode == "zero":
            assert any(write.data)
        if isinstance(write, Write) and mode == "compare":
            assert there[write.offset : write.offset + len(write.data)] != write.data


async def test_whole_units_of_the_target_are_written() -> None:
    """A compressing target needs whole clusters, though the source has smaller holes."""
    content = bytearray(4 * UNIT)
    content[UNIT + 8192 : UNIT + 12288] = b"x" * 4096
    log = WriteLog()
    target = RecordingDevice(disk(bytes(4 * UNIT), discard_granularity=UNIT), log)
    await Copier(access(disk(content)), access(target), target_is_zero=True).run()
    writes = [entry for entry in log.entries if isinstance(entry, Write)]
    assert [(write.offset, len(write.data)) for write in writes] == [(UNIT, UNIT)]


class Asked(Wrapper):
    """Counts what is asked of a disk."""

    def __init__(self, inner: BlockDevice) -> None:
        super().__init__(inner)
        self.statuses: list[int] = []
        self.reads = 0

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        self.statuses.append(length)
        return await super().block_status(offset, length)

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.reads += 1
        await super().readv(offset, buffers)


async def test_a_large_hole_costs_few_questions_and_no_reads() -> None:
    size = 1 << 40
    source = Asked(MemoryDevice(size))
    await Copier(access(source), access(MemoryDevice(size)), target_is_zero=True).run()
    assert len(source.statuses) < 40
    assert source.reads == 0


async def test_several_requests_are_in_flight() -> None:
    class Slow(Wrapper):
        inside = 0
        most = 0

        async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
            Slow.inside += 1
            Slow.most = max(Slow.most, Slow.inside)
            await trio.testing.wait_all_tasks_blocked()
            await super().readv(offset, buffers)
            Slow.inside -= 1

    content = random.Random(1).randbytes(8 * CHUNK)
    target = disk(bytes(8 * CHUNK))
    await Copier(access(Slow(disk(content))), access(target)).run()
    assert target.disk.content == content
    assert Slow.most == 8


@pytest.mark.parametrize("operation", ["readv", "writev", "flush", "block_status"])
async def test_a_failure_is_told(operation: str) -> None:
    source, target = disk(b"x" * MIB), disk(bytes(MIB))
    fault = Fault(operations={operation})
    reading = operation in ("readv", "block_status")
    copier = Copier(
        access(FaultDevice(source, fault) if reading else source),
        access(target if reading else FaultDevice(target, fault)),
    )
    with pytest.raises((DriverError, ExceptionGroup)) as caught:
        await copier.run()
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[-1]
    assert str(error) == "injected fault"
