"""A device in front of another one: the base of the wrappers."""

from __future__ import annotations

from collections.abc import Sequence

from xbd.core.driver.api import (
    BlockDevice,
    BlockStatus,
    Capability,
    Extent,
    Geometry,
    HostExtent,
    ReadRequest,
    WriteRequest,
)


class Wrapper(BlockDevice):
    """Forwards every member to `inner`; a subclass overrides what it wants to meddle with."""

    def __init__(self, inner: BlockDevice) -> None:
        self.inner = inner

    @property
    def geometry(self) -> Geometry:
        return self.inner.geometry

    @property
    def capabilities(self) -> Capability:
        return self.inner.capabilities

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self.inner.readv(offset, buffers)

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self.inner.writev(offset, buffers)

    @property
    def batching(self) -> bool:
        return self.inner.batching

    async def read_many(self, requests: Sequence[ReadRequest]) -> None:
        await self.inner.read_many(requests)

    async def write_many(self, requests: Sequence[WriteRequest]) -> None:
        await self.inner.write_many(requests)

    async def flush(self) -> None:
        await self.inner.flush()

    async def discard(self, extents: Sequence[Extent]) -> None:
        await self.inner.discard(extents)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        await self.inner.write_zeroes(offset, length, may_unmap=may_unmap)

    async def resize(self, size: int) -> Geometry:
        return await self.inner.resize(size)

    async def create_snapshot(self, name: str) -> None:
        await self.inner.create_snapshot(name)

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        return await self.inner.block_status(offset, length)

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        return self.inner.resolve(offset, length, for_write=for_write)

    def zeroes(self, offset: int, length: int) -> int:
        return self.inner.zeroes(offset, length)

    def can_place(self, offset: int, length: int) -> bool:
        return self.inner.can_place(offset, length)

    async def place(self, extents: Sequence[Extent]) -> None:
        await self.inner.place(extents)

    async def aclose(self) -> None:
        await self.inner.aclose()
