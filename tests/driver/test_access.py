"""DeviceAccess: any range and any buffer for the user, only proper calls for the driver."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Sequence

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.driver import (
    BlockDevice,
    BlockStatus,
    Capability,
    Concurrency,
    DeviceAccess,
    DeviceBroken,
    DriverError,
    Extent,
    Geometry,
    HostExtent,
    MediaError,
    NoSpace,
    OpenFailed,
    Unsupported,
)
from xbd.core.driver.testing import ALL_CAPABILITIES, Fault, FaultDevice, MemoryDevice, Wrapper

GEOMETRIES = [
    Geometry(size=0),
    Geometry(size=0, request_alignment=4096),
    Geometry(size=0, memory_alignment=512, max_transfer=8192),
    Geometry(size=0, logical_block=4096, physical_block=4096, memory_alignment=4096),
    Geometry(size=0, request_alignment=4096, discard_granularity=12288, discard_alignment=4096),
]


def over(device: BlockDevice, concurrency: Concurrency = Concurrency.PARALLEL) -> DeviceAccess:
    return DeviceAccess(device, device_id="xbdback1i51712", concurrency=concurrency, writable=True)


def pieces(data: bytes, chance: random.Random) -> list[memoryview]:
    """The data in buffers of odd sizes and addresses, some of them read-only."""
    buffers = []
    while data:
        size = chance.randint(1, max(1, len(data)))
        pad = chance.randint(0, 3)
        raw: bytes | bytearray = bytes(pad) + data[:size]
        buffers.append(memoryview(bytearray(raw) if chance.random() < 0.8 else raw)[pad:])
        data = data[size:]
    return buffers


operations = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "write", "zero", "unmap", "discard"]),
        st.integers(0, 40960),
        st.integers(0, 20000),
        st.integers(0, 1 << 16),
    ),
    max_size=12,
)


@given(st.sampled_from(GEOMETRIES), operations, st.booleans(), st.booleans())
async def test_any_range_against_a_bytearray(
    geometry: Geometry, script: list[tuple[str, int, int, int]], native: bool, odd_end: bool
) -> None:
    size = 40960 + (geometry.logical_block if odd_end else 0)
    capabilities = ALL_CAPABILITIES if native else Capability.WRITE | Capability.DISCARD
    access = over(MemoryDevice(size, geometry=geometry, capabilities=capabilities))
    model = bytearray(size)
    for operation, offset, length, seed in script:
        length = min(length, size - offset)
        chance = random.Random(seed)
        if operation == "write":
            data = chance.randbytes(length)
            await access.writev(offset, pieces(data, chance))
            model[offset : offset + length] = data
        elif operation in ("zero", "unmap"):
            await access.write_zeroes(offset, length, may_unmap=operation == "unmap")
            model[offset : offset + length] = bytes(length)
        elif operation == "discard":
            await access.discard([Extent(offset=offset, length=length)])
            got = bytearray(length)
            await access.readv(offset, [memoryview(got)])
            model[offset : offset + length] = got
        else:
            got = bytearray(length + 1)
            cut = chance.randint(0, length)
            await access.readv(offset, [memoryview(got)[:cut], memoryview(got)[cut:length]])
            assert got[:length] == model[offset : offset + length]
    whole = bytearray(size)
    await access.readv(0, [memoryview(whole)])
    assert whole == model
    assert access.bugs == 0
    await access.aclose()


async def test_small_writes_side_by_side_in_one_block_are_all_kept(make_access) -> None:
    access = make_access(16384, request_alignment=4096)
    async with trio.open_nursery() as nursery:
        for sector in range(32):
            data = memoryview(bytes([sector + 1]) * 512)
            nursery.start_soon(access.writev, sector * 512, [data])
    got = bytearray(16384)
    await access.readv(0, [memoryview(got)])
    assert got == b"".join(bytes([sector + 1]) * 512 for sector in range(32))
    await access.aclose()


async def test_whole_block_writes_wait_for_a_read_modify_write_and_resolve_keeps_off() -> None:
    gate = trio.Event()
    inner = MemoryDevice(16384, geometry=Geometry(size=0, request_alignment=4096))
    device = FaultDevice(inner, Fault(operations={"readv"}, wait=gate, error=None, times=1))
    device.resolve = inner.resolve  # type: ignore[method-assign]
    access = over(device)
    forgotten = []

    async def forget(offset: int, length: int) -> None:
        forgotten.append((offset, length))

    access.subscribe(forget)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.writev, 4096 + 512, [memoryview(b"s" * 512)])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(access.writev, 4096, [memoryview(b"W" * 4096)])
        await trio.testing.wait_all_tasks_blocked()
        assert forgotten == [(4096, 4096)]
        assert access.resolve(4096, 512, for_write=True) is None
        before = access.resolve(0, 512, for_write=True)
        assert before is not None
        assert before[0].length == 4096
        assert access.resolve(4096, 512, for_write=False) is not None
        gate.set()
    assert inner.disk.content[4096:8192] == b"W" * 4096
    answer = access.resolve(4096, 512, for_write=True)
    assert answer is not None
    assert answer[0].length == 12288
    access.unsubscribe(forget)
    assert access.generation == 1
    await access.aclose()


class Busy(Wrapper):
    """Notes how many calls are in progress."""

    def __init__(self, inner: BlockDevice) -> None:
        super().__init__(inner)
        self.now = self.most = 0

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await trio.lowlevel.checkpoint()
        await super().readv(offset, buffers)
        self.now -= 1


@pytest.mark.parametrize(
    ("concurrency", "most"), [(Concurrency.SERIAL, 1), (Concurrency.PARALLEL, 5)]
)
async def test_serial_devices_get_one_call_at_a_time(concurrency: Concurrency, most: int) -> None:
    device = Busy(MemoryDevice(4096))
    access = over(device, concurrency)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(access.readv, 0, [memoryview(bytearray(512))])
    assert device.most == most
    await access.aclose()


class Calls(Wrapper):
    """Notes the calls that arrive."""

    def __init__(self, inner: BlockDevice) -> None:
        super().__init__(inner)
        self.seen: list[tuple[object, ...]] = []

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.seen.append(("write", offset, sum(map(len, buffers))))
        await super().writev(offset, buffers)

    async def discard(self, extents: Sequence[Extent]) -> None:
        self.seen += [("discard", extent.offset, extent.length) for extent in extents]
        await super().discard(extents)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        self.seen.append(("zero", offset, length))
        raise Unsupported("not today")


async def test_long_requests_are_split(make_access) -> None:
    access = make_access(65536, wrap=Calls, max_transfer=10000)
    await access.writev(512, [memoryview(bytes(20000 - 20000 % 512))])
    assert access._device.seen == [
        ("write", 512, 9728),
        ("write", 10240, 9728),
        ("write", 19968, 512),
    ]
    await access.aclose()


async def test_discards_shrink_to_whole_granules(make_access) -> None:
    access = make_access(65536 + 512, wrap=Calls, discard_granularity=8192, discard_alignment=4096)
    await access.discard(
        [
            Extent(offset=0, length=4096),
            Extent(offset=512, length=30000),
            Extent(offset=60000, length=65536 + 512 - 60000),
            Extent(offset=13000, length=100),
        ]
    )
    assert access._device.seen == [("discard", 4096, 24576), ("discard", 61440, 4608)]
    await access.aclose()


async def test_zeroes_are_written_where_the_driver_can_not(make_access) -> None:
    access = make_access(3 << 20, wrap=Calls, max_transfer=1 << 20)
    await access.writev(0, [memoryview(b"x" * (3 << 20))])
    access._device.seen.clear()
    await access.write_zeroes(512, (2 << 20) + 1024)
    assert [call[0] for call in access._device.seen] == ["zero", "write", "write", "write"]
    got = bytearray(3 << 20)
    await access.readv(0, [memoryview(got)])
    assert got == b"x" * 512 + bytes((2 << 20) + 1024) + b"x" * ((1 << 20) - 1536)
    await access.aclose()


async def test_capabilities_are_checked_before_the_driver_is_called(make_access) -> None:
    access = make_access(4096, writable=False)
    assert access.capabilities == Capability.FLUSH
    with pytest.raises(Unsupported) as caught:
        await access.writev(0, [memoryview(bytes(512))])
    assert caught.value.errno == errno.EROFS
    with pytest.raises(Unsupported):
        await access.discard([Extent(offset=0, length=512)])
    with pytest.raises(Unsupported):
        await access.write_zeroes(0, 512)
    with pytest.raises(Unsupported):
        await access.resize(8192)
    assert access.resolve(0, 512, for_write=True) is None
    assert access.resolve(0, 512, for_write=False) is not None
    await access.aclose()


async def test_flushing_a_device_whose_writes_are_durable_does_nothing(make_access) -> None:
    access = make_access(4096, capabilities=Capability.WRITE)
    await access.flush()
    await access.aclose()


@pytest.mark.parametrize(
    ("raised", "expected", "number"),
    [
        (OSError(errno.ENOSPC, "full"), NoSpace, errno.ENOSPC),
        (OSError(errno.EIO, "bad"), MediaError, errno.EIO),
        (OSError(errno.EOPNOTSUPP, "no"), Unsupported, errno.EOPNOTSUPP),
        (OSError(errno.ENODEV, "gone"), DeviceBroken, errno.ENODEV),
        (ExceptionGroup("x", [OSError(errno.EIO, "a"), DeviceBroken("b")]), DeviceBroken, 5),
        (DeviceBroken("gone", errno=errno.ENXIO), DeviceBroken, errno.ENXIO),
    ],
)
async def test_errors_are_told_by_errno(
    make_access, raised: Exception, expected: type[DriverError], number: int
) -> None:
    fault = Fault(operations={"readv"}, error=lambda: raised)
    access = make_access(4096, wrap=lambda device: FaultDevice(device, fault))
    with pytest.raises(expected) as caught:
        await access.readv(0, [memoryview(bytearray(512))])
    assert type(caught.value) is expected
    assert caught.value.errno == number
    assert access.bugs == 0
    await access.aclose()


@pytest.mark.parametrize("bug", [ZeroDivisionError("x"), NotImplementedError(), AssertionError()])
async def test_other_exceptions_are_bugs(make_access, caplog, bug: Exception) -> None:
    fault = Fault(operations={"flush"}, error=lambda: bug)
    access = make_access(4096, wrap=lambda device: FaultDevice(device, fault))
    with caplog.at_level(logging.ERROR), pytest.raises(DriverError) as caught:
        await access.flush()
    assert type(caught.value) is DriverError
    assert caught.value.errno == errno.EIO
    assert access.bugs == 1
    assert "xbdback1i51712" in caplog.text
    assert "Traceback" in caplog.text
    await access.aclose()


@pytest.mark.parametrize(
    "extent",
    [
        HostExtent(fd=-1, offset=0, length=512),
        HostExtent(fd=0, offset=-512, length=512),
        HostExtent(fd=0, offset=0, length=0),
        HostExtent(fd=0, offset=0, length=-512),
        HostExtent(fd=0, offset=1 << 62, length=1 << 63),
    ],
)
async def test_a_resolve_that_tells_nonsense_is_a_bug_and_no_answer(
    make_access, caplog, extent: HostExtent
) -> None:
    class Confused(Wrapper):
        def resolve(self, offset: int, length: int, *, for_write: bool) -> list[HostExtent]:
            return [HostExtent(fd=0, offset=0, length=512), extent]

    access = make_access(4096, wrap=Confused)
    assert access.resolve(0, 4096, for_write=False) is None
    assert access.bugs == 1
    assert "bug in the driver" in caplog.text
    await access.aclose()


async def test_a_resolve_that_raises_is_a_bug_and_no_answer(make_access, caplog) -> None:
    class Broken(Wrapper):
        def resolve(self, offset: int, length: int, *, for_write: bool) -> None:
            raise IndexError

    access = make_access(4096, wrap=Broken)
    assert access.resolve(0, 512, for_write=False) is None
    assert access.bugs == 1
    await access.aclose()


@pytest.mark.parametrize(("offset", "length"), [(4096, 1), (0, 4097), (-1, 512), (1 << 70, 1)])
async def test_ranges_outside_the_disk(make_access, offset: int, length: int) -> None:
    access = make_access(4096)
    with pytest.raises(DriverError, match="outside"):
        await access.readv(offset, [memoryview(bytearray(length))])
    with pytest.raises(DriverError, match="outside"):
        await access.write_zeroes(offset, length)
    await access.aclose()


async def test_cancelling_a_writer_that_waits_leaves_the_lock_usable() -> None:
    gate = trio.Event()
    inner = MemoryDevice(8192, geometry=Geometry(size=0, request_alignment=4096))
    access = over(FaultDevice(inner, Fault(operations={"readv"}, wait=gate, error=None, times=1)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.writev, 512, [memoryview(b"a" * 512)])
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as waiting:
                waiting.start_soon(access.writev, 1024, [memoryview(b"b" * 512)])
                waiting.start_soon(access.writev, 0, [memoryview(b"c" * 4096)])
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        gate.set()
    assert inner.disk.content[:2048] == bytes(512) + b"a" * 512 + bytes(1024)
    await access.writev(0, [memoryview(b"d" * 8192)])
    assert inner.disk.content == b"d" * 8192
    await access.aclose()


async def test_cancelled_together_with_a_failure_is_just_cancelled(caplog) -> None:
    class Nursing(Wrapper):
        async def flush(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.fail_when_cancelled)
                await trio.sleep_forever()

        async def fail_when_cancelled(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError

    access = over(Nursing(MemoryDevice(4096)))
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(access.flush)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert access.bugs == 1
    await access.aclose()


async def test_resize_waits_for_writers_and_takes_extents_back(make_access) -> None:
    access = make_access(8192)
    forgotten = []

    async def forget(offset: int, length: int) -> None:
        forgotten.append(offset)

    access.subscribe(forget)
    assert (await access.resize(16384)).size == 16384
    assert access.geometry.size == 16384
    await access.writev(12288, [memoryview(b"n" * 4096)])
    await access.resize(4096)
    assert forgotten == [8192, 8192, 4096, 4096]
    with pytest.raises(DriverError, match="outside"):
        await access.writev(4096, [memoryview(b"n" * 512)])
    with pytest.raises(DriverError, match="multiple"):
        await access.resize(1000)
    await access.aclose()


async def test_a_snapshot_is_of_one_moment(nursery) -> None:
    writing, written, taking, taken = (trio.Event() for _ in range(4))

    class Slow(Wrapper):
        async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
            writing.set()
            await written.wait()
            await super().writev(offset, buffers)

        async def create_snapshot(self, name: str) -> None:
            taking.set()
            await taken.wait()
            await super().create_snapshot(name)

    memory = MemoryDevice(8192)
    access = over(Slow(memory))
    log = []

    async def forget(offset: int, length: int) -> None:
        assert access.resolve(0, 512, for_write=True) is None
        log.append((offset, length > 8192))

    async def write(offset: int, byte: bytes) -> None:
        await access.writev(offset, [memoryview(byte * 512)])
        log.append(byte)

    access.subscribe(forget)
    assert access.resolve(0, 512, for_write=True) is not None
    nursery.start_soon(write, 0, b"a")
    await writing.wait()
    nursery.start_soon(access.create_snapshot, "one")
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(write, 4096, b"b")
    await trio.testing.wait_all_tasks_blocked()
    assert access.resolve(0, 512, for_write=True) is None
    assert access.resolve(0, 512, for_write=False) is not None
    assert log == []
    written.set()
    await taking.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert log == [b"a", (0, True)]
    assert access.resolve(0, 512, for_write=True) is None
    taken.set()
    await trio.testing.wait_all_tasks_blocked()
    assert log == [b"a", (0, True), b"b"]
    assert memory.disk.snapshots == [("one", b"a" * 512 + bytes(7680))]
    assert access.resolve(0, 512, for_write=True) is not None
    await access.aclose()


async def test_closing_waits_for_a_snapshot(nursery) -> None:
    go_on = trio.Event()
    memory = MemoryDevice(4096)
    access = over(
        FaultDevice(memory, Fault(operations={"create_snapshot"}, wait=go_on, error=None))
    )
    nursery.start_soon(access.create_snapshot, "one")
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(access.aclose)
    await trio.testing.wait_all_tasks_blocked()
    assert not memory.closed
    go_on.set()
    await trio.testing.wait_all_tasks_blocked()
    assert memory.closed
    assert memory.disk.snapshots
    with pytest.raises(DeviceBroken, match="closed"):
        await access.create_snapshot("two")


async def test_without_the_capability_there_are_no_snapshots() -> None:
    access = over(MemoryDevice(4096, capabilities=Capability.WRITE))
    with pytest.raises(Unsupported, match="can't be kept in snapshots"):
        await access.create_snapshot("one")
    readonly = DeviceAccess(
        MemoryDevice(4096, capabilities=ALL_CAPABILITIES),
        device_id="xbdback1i51712",
        concurrency=Concurrency.PARALLEL,
        writable=False,
    )
    assert Capability.SNAPSHOT not in readonly.capabilities


async def test_closed_is_closed(make_access) -> None:
    access = make_access(4096)
    with trio.CancelScope() as scope:
        scope.cancel()
        await access.aclose()
    await access.aclose()
    assert access._device.closed
    with pytest.raises(DeviceBroken, match="closed"):
        await access.readv(0, [memoryview(bytearray(512))])
    assert access.resolve(0, 512, for_write=False) is None


@pytest.mark.parametrize(
    ("geometry", "why"),
    [
        ({"logical_block": 256}, "logical_block"),
        ({"logical_block": 1000}, "power of two"),
        ({"logical_block": 4096}, "physical_block"),
        ({"max_transfer": 100}, "max_transfer"),
        ({"memory_alignment": 0}, "memory_alignment"),
        ({"discard_granularity": 4096, "discard_alignment": 4096}, "discard_alignment"),
    ],
)
async def test_impossible_geometries(make_access, geometry: dict[str, int], why: str) -> None:
    with pytest.raises(OpenFailed, match=why):
        make_access(8192, **geometry)


async def test_resolved_extents_are_where_the_bytes_are(make_access) -> None:
    access = make_access(8192)
    await access.writev(1024, [memoryview(b"here" * 128)])
    answer = access.resolve(1024, 512, for_write=False)
    assert answer is not None
    assert os.pread(answer[0].fd, 512, answer[0].offset) == b"here" * 128
    await access.aclose()


# -- holes and zeroes ---------------------------------------------------------------------------


class Telling(Wrapper):
    """Says what it is told to say, and notes what it is asked."""

    def __init__(self, inner: BlockDevice, answers: dict[int, list[BlockStatus]]) -> None:
        super().__init__(inner)
        self.answers = answers
        self.asked: list[tuple[int, int]] = []

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        self.asked.append((offset, length))
        await trio.lowlevel.checkpoint()
        return self.answers[offset]


def data(length: int) -> BlockStatus:
    return BlockStatus(length=length, hole=False, zero=False)


def hole(length: int) -> BlockStatus:
    return BlockStatus(length=length, hole=True, zero=True)


async def test_block_status_covers_the_range_however_little_the_driver_says(make_access) -> None:
    answers = {
        0: [hole(4096), data(512)],
        4608: [data(3584)],
        8192: [BlockStatus(length=512, hole=False, zero=True), hole(16384 - 8704)],
    }
    access = make_access(16384, wrap=lambda device: Telling(device, answers))
    told = await access.block_status(0, 16384)
    zero = BlockStatus(length=512, hole=False, zero=True)
    assert told == [hole(4096), data(4096), zero, hole(7680)]
    assert access._device.asked == [(0, 16384), (4608, 11776), (8192, 8192)]
    await access.aclose()


async def test_block_status_of_part_of_a_block(make_access) -> None:
    answers = {4096: [hole(4096)], 8192: [data(8192)]}
    access = make_access(
        16384, wrap=lambda device: Telling(device, answers), request_alignment=4096
    )
    assert await access.block_status(5000, 4000) == [hole(3192), data(808)]
    assert await access.block_status(8191, 1) == [hole(1)]
    assert await access.block_status(16384, 0) == []
    assert access._device.asked[0] == (4096, 8192)
    assert [offset for offset, _ in access._device.asked] == [4096, 8192, 4096]
    await access.aclose()


async def test_a_driver_that_knows_nothing_says_data(make_access) -> None:
    class Ignorant(Wrapper):
        block_status = BlockDevice.block_status

    access = make_access(8192, wrap=Ignorant)
    assert await access.block_status(512, 7680) == [data(7680)]
    await access.aclose()


@pytest.mark.parametrize("answer", [[], [data(0)]])
async def test_a_driver_that_says_nothing_fails_that_request(
    make_access, answer: list[BlockStatus]
) -> None:
    access = make_access(8192, wrap=lambda device: Telling(device, {0: answer}))
    with pytest.raises(DriverError, match="nothing of byte 0"):
        await access.block_status(0, 4096)
    await access.aclose()


async def test_block_status_outside_the_disk_and_of_a_failing_driver(make_access) -> None:
    fault = Fault(operations={"block_status"}, error=lambda: OSError(errno.EIO, "bad"))
    access = make_access(8192, wrap=lambda device: FaultDevice(device, fault))
    with pytest.raises(DriverError, match="outside"):
        await access.block_status(8192, 1)
    with pytest.raises(MediaError, match="asking about 512 bytes at 0"):
        await access.block_status(0, 512)
    await access.aclose()


async def test_block_status_waits_its_turn_on_a_serial_device(make_access) -> None:
    gate = trio.Event()
    device = FaultDevice(
        MemoryDevice(8192), Fault(operations={"writev"}, wait=gate, error=None, times=1)
    )
    access = over(device, Concurrency.SERIAL)
    told = []

    async def ask() -> None:
        told.append(await access.block_status(0, 8192))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.writev, 0, [memoryview(b"x" * 8192)])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert not told
        gate.set()
    assert told == [[data(8192)]]
    await access.aclose()
