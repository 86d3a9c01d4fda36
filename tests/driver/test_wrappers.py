"""Wrappers forward everything, faults strike as told, recordings replay."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from xbd.core.driver import (
    BlockDevice,
    Capability,
    DeviceBroken,
    Extent,
    MediaError,
    NoSpace,
    ReadRequest,
    WriteRequest,
)
from xbd.core.driver.testing import (
    Fault,
    FaultDevice,
    Flush,
    MemoryDevice,
    RecordingDevice,
    Wrapper,
    Write,
    WriteLog,
)


def members(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


def test_wrappers_forward_every_member_of_the_interface() -> None:
    assert members(BlockDevice) <= members(Wrapper)
    for name in members(BlockDevice):
        ours, theirs = vars(Wrapper)[name], vars(BlockDevice)[name]
        if not isinstance(theirs, property):
            assert inspect.signature(ours) == inspect.signature(theirs)


def test_every_call_that_can_fail_can_be_made_to() -> None:
    asynchronous = {
        name
        for name in members(BlockDevice)
        if inspect.iscoroutinefunction(vars(BlockDevice)[name])
    }
    assert asynchronous - {"read_many", "write_many"} == Fault().operations
    assert asynchronous <= members(FaultDevice)


def data(length: int = 512, byte: bytes = b"x") -> list[memoryview]:
    return [memoryview(bytearray(byte * length))]


class Batching(MemoryDevice):
    """Does one after the other, which is all that this is about."""

    batching = True

    async def read_many(self, requests: Sequence[ReadRequest]) -> None:
        for request in requests:
            await self.readv(request.offset, request.buffers)

    async def write_many(self, requests: Sequence[WriteRequest]) -> None:
        for request in requests:
            await self.writev(request.offset, request.buffers)


@pytest.mark.parametrize("after", [False, True])
async def test_of_many_requests_those_fail_that_are_hit(after: bool) -> None:
    inner = Batching(1 << 20)
    aimed = Fault(operations={"readv", "writev"}, after=after, trigger=lambda _, at, __: at == 512)
    device = FaultDevice(inner, aimed)
    assert device.batching
    writes = [WriteRequest(at, data()) for at in (0, 512, 1024)]
    await device.write_many(writes)
    assert [isinstance(one.error, MediaError) for one in writes] == [False, True, False]
    assert inner.disk.content[:1536] == b"x" * 512 + (b"x" if after else b"\0") * 512 + b"x" * 512
    reads = [ReadRequest(at, data(byte=b"-")) for at in (0, 512, 1024)]
    await device.read_many(reads)
    assert [isinstance(one.error, MediaError) for one in reads] == [False, True, False]
    assert [bytes(one.buffers[0][:1]) for one in reads] == [b"x", b"x" if after else b"-", b"x"]
    await device.aclose()


async def test_faults_strike_where_they_are_aimed() -> None:
    fault = Fault(
        operations={"writev"},
        trigger=lambda operation, offset, length: offset == 1024,
        error=lambda: DeviceBroken("gone"),
        times=1,
    )
    device = FaultDevice(MemoryDevice(4096), fault)
    assert device.resolve(0, 512, for_write=True) is None
    await device.writev(0, data())
    await device.readv(1024, data())
    with pytest.raises(DeviceBroken):
        await device.writev(1024, data())
    await device.writev(1024, data())
    assert fault.hits == 1
    device.faults.clear()
    assert device.resolve(0, 512, for_write=True) is not None
    await device.aclose()


async def test_faults_by_rate_are_repeatable() -> None:
    async def failures(seed: int) -> list[int]:
        device = FaultDevice(MemoryDevice(4096), Fault(operations={"readv"}, rate=0.3), seed=seed)
        failed = []
        for turn in range(100):
            try:
                await device.readv(0, data())
            except MediaError:
                failed.append(turn)
        await device.aclose()
        return failed

    first = await failures(1)
    assert 10 < len(first) < 60
    assert first == await failures(1)
    assert first != await failures(2)


async def test_faults_may_only_delay() -> None:
    gate = trio.Event()
    device = FaultDevice(MemoryDevice(4096), Fault(operations={"flush"}, wait=gate, error=None))
    done = []

    async def flush() -> None:
        await device.flush()
        done.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush)
        await trio.testing.wait_all_tasks_blocked()
        assert not done
        gate.set()
    assert done
    await device.aclose()


async def test_faults_may_strike_after_the_work_is_done() -> None:
    inner = MemoryDevice(4096)
    device = FaultDevice(inner, Fault(operations={"writev"}, after=True))
    with pytest.raises(MediaError):
        await device.writev(0, data())
    assert inner.disk.content[:512] == b"x" * 512
    await device.aclose()


def test_faults_for_unknown_operations_are_refused() -> None:
    with pytest.raises(ValueError, match="wirtev"):
        Fault(operations={"wirtev"})


async def test_a_recording_replays() -> None:
    inner = MemoryDevice(8192)
    device = RecordingDevice(inner)
    base = inner.disk.content
    await device.writev(0, [*data(512, b"a"), *data(512, b"b")])
    await device.flush()
    await device.write_zeroes(512, 512, may_unmap=True)
    await device.discard([Extent(offset=4096, length=4096)])
    assert [type(entry) for entry in device.log.entries] == [Write, Flush, Write, Write]
    assert device.log.replay(base) == inner.disk.content
    assert device.log.replay(base, 1)[:1024] == b"a" * 512 + b"b" * 512
    assert device.resolve(0, 512, for_write=True) is None
    assert device.resolve(0, 512, for_write=False) is not None
    await device.aclose()


async def test_a_write_that_ends_after_a_flush_began_is_not_made_durable_by_it() -> None:
    gate = trio.Event()
    inner = MemoryDevice(4096)
    slow = FaultDevice(inner, Fault(operations={"flush"}, wait=gate, error=None))
    device = RecordingDevice(slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.flush)
        await trio.testing.wait_all_tasks_blocked()
        await device.writev(0, data())
        gate.set()
    assert [type(entry) for entry in device.log.entries] == [Flush, Write]
    await device.aclose()


def test_crash_states_keep_what_was_flushed_and_lose_anything_else() -> None:
    log = WriteLog()
    log.write(0, b"a" * 1024)
    log.flush()
    log.write(0, b"b" * 1024)
    log.write(1024, b"c" * 512)
    states = list(log.crash_states(bytes(2048), count=300, seed=1))
    assert states == list(log.crash_states(bytes(2048), count=300, seed=1))
    late = {image for at, image in states if at == 4}
    for image in late:
        assert set(image[:1024]) <= set(b"ab")
        assert image[:512] in (b"a" * 512, b"b" * 512)
    assert len(late) == 8


async def test_memory_with_little_space() -> None:
    device = MemoryDevice(65536, space=8192)
    assert device.resolve(0, 512, for_write=True) is None
    await device.writev(0, data(8192))
    with pytest.raises(NoSpace):
        await device.writev(8192, data())
    await device.write_zeroes(0, 4096, may_unmap=True)
    await device.writev(8192, data())
    assert Capability.WRITE in device.capabilities
    await device.aclose()
