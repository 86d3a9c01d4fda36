"""The conformance suite passes good devices and catches each kind of bad one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from xbd.core.driver import (
    BlockDevice,
    Capability,
    Concurrency,
    Extent,
    Geometry,
    HostExtent,
    MediaError,
    OpenContext,
    ReadRequest,
    WriteRequest,
)
from xbd.core.driver.testing import (
    ALL_CAPABILITIES,
    FaultDevice,
    MemoryDevice,
    MemoryDisk,
    RecordingDevice,
    Wrapper,
    check_block_device,
    check_driver,
    memory_driver,
)
from xbd.core.driver.testing.conformance import CHECKS

SIZE = 256 << 10


def maker(
    wrap: Callable[[MemoryDevice], BlockDevice] = lambda device: device,
    *,
    disk: MemoryDisk | None = None,
    **device_options: Any,
) -> Any:
    """Opens one and the same memory disk, wrapped."""
    memory = disk or MemoryDisk(SIZE)

    @asynccontextmanager
    async def make(context: OpenContext) -> AsyncIterator[BlockDevice]:
        device = wrap(MemoryDevice(memory, writable=context.writable, **device_options))
        yield device
        await device.aclose()

    return make


async def test_the_memory_driver_conforms() -> None:
    await check_driver(memory_driver(), "memory:x?size=1M", examples=20)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(size=0, logical_block=4096, physical_block=4096, memory_alignment=512),
        Geometry(size=0, request_alignment=4096, max_transfer=65536),
        Geometry(size=0, discard_granularity=65536),
    ],
)
@pytest.mark.parametrize("concurrency", list(Concurrency))
async def test_other_geometries_conform(geometry: Geometry, concurrency: Concurrency) -> None:
    full = maker(disk=MemoryDisk(SIZE), geometry=geometry, space=SIZE // 2)
    await check_block_device(
        maker(geometry=geometry), concurrency=concurrency, make_full=full, examples=5
    )


@pytest.mark.parametrize(
    "capabilities",
    [Capability.NONE, Capability.WRITE, ALL_CAPABILITIES & ~Capability.WRITE_ZEROES],
)
async def test_modest_devices_conform(capabilities: Capability) -> None:
    await check_block_device(maker(capabilities=capabilities), examples=5)


@pytest.mark.parametrize("wrapper", [FaultDevice, RecordingDevice])
async def test_the_wrappers_conform(wrapper: Callable[[MemoryDevice], BlockDevice]) -> None:
    await check_block_device(maker(wrapper), examples=5)


class KeepsBuffers(Wrapper):
    """Answers at once, writes a little later from the same buffer."""

    def __init__(self, inner: BlockDevice) -> None:
        super().__init__(inner)
        self.pending: list[tuple[int, Sequence[memoryview]]] = []

    async def settle(self) -> None:
        while self.pending:
            offset, buffers = self.pending.pop(0)
            await super().writev(offset, buffers)

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.pending.append((offset, buffers))

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self.settle()
        await super().readv(offset, buffers)


async def abandon_when_cancelled(call: Callable[[], Awaitable[None]]) -> None:
    """On cancellation leaves the call to somebody else, as an abandoned thread would."""
    done = trio.Event()

    async def work() -> None:
        for _ in range(4):
            await trio.lowlevel.checkpoint()
        await call()
        done.set()

    trio.lowlevel.spawn_system_task(work)
    await done.wait()


class WritesAfterCancel(Wrapper):
    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await abandon_when_cancelled(lambda: self.inner.writev(offset, buffers))


class FillsAfterCancel(Wrapper):
    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await abandon_when_cancelled(lambda: self.inner.readv(offset, buffers))


class LosesNeighbours(Wrapper):
    """Widens every write to 4 KiB blocks and locks nothing meanwhile."""

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        data = b"".join(buffers)
        low = offset - offset % 4096
        wide = bytearray(offset + len(data) + -(offset + len(data)) % 4096 - low)
        await super().readv(low, [memoryview(wide)])
        wide[offset - low : offset - low + len(data)] = data
        await super().writev(low, [memoryview(wide)])


class DiscardsTooMuch(Wrapper):
    async def discard(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            start = max(0, extent.offset - 512)
            length = extent.length + extent.offset - start
            await super().discard([Extent(offset=start, length=length)])


class ZeroesAreNot(Wrapper):
    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        if not may_unmap:
            await super().write_zeroes(offset, length, may_unmap=False)


class ForgetsTheLastBlock(Wrapper):
    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        if offset + sum(map(len, buffers)) != self.geometry.size:
            await super().writev(offset, buffers)


class ResolvesWrongly(Wrapper):
    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        answer = self.inner.resolve(offset, length, for_write=for_write)
        assert answer is not None
        return [attrs.evolve(extent, offset=extent.offset ^ 4096) for extent in answer]


class NeverInvalidates(Wrapper):
    """Moves its content to another file on a discard and tells nobody."""

    moved: MemoryDevice | None = None

    async def discard(self, extents: Sequence[Extent]) -> None:
        assert isinstance(self.inner, MemoryDevice)
        disk = MemoryDisk(SIZE)
        self.moved = MemoryDevice(disk)
        await self.moved.writev(0, [memoryview(self.inner.disk.content)])
        self.inner = self.moved


class PlacesOverOthers(Wrapper):
    """Finds a place for what has one already, and empties it."""

    def can_place(self, offset: int, length: int) -> bool:
        return True

    async def place(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            await self.inner.write_zeroes(extent.offset, extent.length, may_unmap=False)


class MixesUpMany(Wrapper):
    """What is asked for together goes to each other's places."""

    batching = True

    async def read_many(self, requests: Sequence[ReadRequest]) -> None:
        for request in requests:
            await self.inner.readv(request.offset, request.buffers)

    async def write_many(self, requests: Sequence[WriteRequest]) -> None:
        for request, other in zip(requests, reversed(requests), strict=True):
            if len(request.buffers[0]) == len(other.buffers[0]):
                await self.inner.writev(request.offset, other.buffers)


class ClaimsTooMuch(Wrapper):
    capabilities = ALL_CAPABILITIES


class HasNoFlush(MemoryDevice):
    flush = BlockDevice.flush


class ClosesOnce(Wrapper):
    closed = False

    async def aclose(self) -> None:
        if self.closed:
            raise MediaError("closed already")
        self.closed = True
        await super().aclose()


class RaisesAnything(Wrapper):
    async def flush(self) -> None:
        raise RuntimeError("what?")


class IsVolatile(Wrapper):
    async def aclose(self) -> None:
        if Capability.WRITE in self.capabilities and not self.inner.closed:  # type: ignore[attr-defined]
            await self.inner.writev(0, [memoryview(bytes(4096))])
        await super().aclose()


@pytest.mark.parametrize(
    ("wrap", "check"),
    [
        (KeepsBuffers, "writing"),
        (WritesAfterCancel, "cancelled_changes"),
        (FillsAfterCancel, "cancelled_reads"),
        (LosesNeighbours, "parallel"),
        (DiscardsTooMuch, "discard"),
        (ZeroesAreNot, "zeroes"),
        (ForgetsTheLastBlock, "writing"),
        (ResolvesWrongly, "read_only"),
        (NeverInvalidates, "random"),
        (PlacesOverOthers, "random"),
        (MixesUpMany, "random"),
        (ClaimsTooMuch, "read_only"),
        (ClosesOnce, "promises"),
        (RaisesAnything, "writing"),
        (IsVolatile, "reopening"),
    ],
)
async def test_bad_devices_are_caught(
    wrap: Callable[[MemoryDevice], BlockDevice], check: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        # As many as it takes where chance has to find it.
        await check_block_device(maker(wrap), examples=1000 if check == "random" else 30)
    assert any(f"check {check!r}" in note for note in caught.value.__notes__), caught.value


async def test_a_claim_without_a_method_is_caught() -> None:
    @asynccontextmanager
    async def make(context: OpenContext) -> AsyncIterator[BlockDevice]:
        yield HasNoFlush(SIZE)

    with pytest.raises(AssertionError, match="flush is not implemented"):
        await check_block_device(make)


async def test_full_storage_must_be_told() -> None:
    with pytest.raises(AssertionError, match="never runs out"):
        await check_block_device(maker(), make_full=maker(), examples=1)


def test_every_check_is_in_the_suite() -> None:
    from xbd.core.driver.testing import checks_basic, checks_hostile, checks_random

    written = {
        value
        for module in (checks_basic, checks_hostile, checks_random)
        for name, value in vars(module).items()
        if name.startswith("check_")
    }
    assert written == set(CHECKS)
