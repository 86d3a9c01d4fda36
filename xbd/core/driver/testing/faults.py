"""A device that fails, or waits, when told to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

import attrs
import trio

from xbd.core.driver.api import (
    BlockDevice,
    BlockStatus,
    Extent,
    Geometry,
    HostExtent,
    ReadRequest,
    WriteRequest,
)
from xbd.core.driver.buffers import total
from xbd.core.driver.testing.wrapper import Wrapper
from xbd.core.errors import DriverError, MediaError

OPERATIONS: Final = frozenset(
    {
        "readv",
        "writev",
        "flush",
        "discard",
        "write_zeroes",
        "resize",
        "create_snapshot",
        "block_status",
        "place",
        "aclose",
    }
)

Trigger = Callable[[str, int, int], bool]
"""Given operation, offset and length: whether this call is meant."""


def media_error() -> Exception:
    """What a fault raises unless told otherwise."""
    return MediaError("injected fault")


@attrs.define(kw_only=True)
class Fault:
    """Which calls are hit, and by what."""

    operations: frozenset[str] | set[str] = OPERATIONS
    trigger: Trigger | None = None
    """Hits only calls for which this is true."""
    rate: float = 1.0
    """Share of the calls that are hit."""
    times: int | None = None
    """How many calls are hit at most."""
    wait: trio.Event | None = None
    """A call that is hit first waits for this."""
    error: Callable[[], BaseException] | None = media_error
    """Makes what is raised; None: the call goes on."""
    after: bool = False
    """Raise after the device has done its work, as when an acknowledgement is lost."""
    hits: int = 0

    def __attrs_post_init__(self) -> None:
        unknown = self.operations - OPERATIONS
        if unknown:
            raise ValueError(f"no operations of a device: {sorted(unknown)}")


class FaultDevice(Wrapper):
    """`inner` with faults, which may be added and removed at any time.

    While there are faults, nothing resolves: every call comes through here.
    """

    def __init__(self, inner: BlockDevice, *faults: Fault, seed: int = 0) -> None:
        super().__init__(inner)
        self.faults = list(faults)
        self._random = random.Random(seed)

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        late = await self._meet("readv", offset, total(buffers))
        await super().readv(offset, buffers)
        _raise(late)

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        late = await self._meet("writev", offset, total(buffers))
        await super().writev(offset, buffers)
        _raise(late)

    async def read_many(self, requests: Sequence[ReadRequest]) -> None:
        late = await self._meet_each("readv", requests)
        await super().read_many([one for one in requests if one.error is None])
        _fail_late(late)

    async def write_many(self, requests: Sequence[WriteRequest]) -> None:
        late = await self._meet_each("writev", requests)
        await super().write_many([one for one in requests if one.error is None])
        _fail_late(late)

    async def flush(self) -> None:
        late = await self._meet("flush", 0, 0)
        await super().flush()
        _raise(late)

    async def discard(self, extents: Sequence[Extent]) -> None:
        late = []
        for extent in extents:
            late += await self._meet("discard", extent.offset, extent.length)
        await super().discard(extents)
        _raise(late)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        late = await self._meet("write_zeroes", offset, length)
        await super().write_zeroes(offset, length, may_unmap=may_unmap)
        _raise(late)

    async def resize(self, size: int) -> Geometry:
        late = await self._meet("resize", 0, size)
        geometry = await super().resize(size)
        _raise(late)
        return geometry

    async def create_snapshot(self, name: str) -> None:
        late = await self._meet("create_snapshot", 0, 0)
        await super().create_snapshot(name)
        _raise(late)

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        late = await self._meet("block_status", offset, length)
        told = await super().block_status(offset, length)
        _raise(late)
        return told

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        if self.faults:
            return None
        return super().resolve(offset, length, for_write=for_write)

    async def place(self, extents: Sequence[Extent]) -> None:
        late = []
        for extent in extents:
            late += await self._meet("place", extent.offset, extent.length)
        await super().place(extents)
        _raise(late)

    async def aclose(self) -> None:
        late = await self._meet("aclose", 0, 0)
        await super().aclose()
        _raise(late)

    async def _meet_each(
        self, operation: str, requests: Sequence[ReadRequest | WriteRequest]
    ) -> list[tuple[ReadRequest | WriteRequest, list[Fault]]]:
        """As `_meet` for each request, which fails alone."""
        late = []
        for request in requests:
            try:
                faults = await self._meet(operation, request.offset, total(request.buffers))
            except DriverError as error:
                request.error = error
            else:
                late.append((request, faults))
        return late

    async def _meet(self, operation: str, offset: int, length: int) -> list[Fault]:
        """Suffer what applies; the faults that strike afterwards."""
        late = []
        for fault in tuple(self.faults):
            if not self._hits(fault, operation, offset, length):
                continue
            fault.hits += 1
            if fault.wait is not None:
                await fault.wait.wait()
            if fault.after:
                late.append(fault)
            else:
                _raise([fault])
        return late

    def _hits(self, fault: Fault, operation: str, offset: int, length: int) -> bool:
        return (
            operation in fault.operations
            and (fault.times is None or fault.hits < fault.times)
            and (fault.trigger is None or fault.trigger(operation, offset, length))
            and (fault.rate >= 1.0 or self._random.random() < fault.rate)
        )


def _fail_late(late: Sequence[tuple[ReadRequest | WriteRequest, list[Fault]]]) -> None:
    for request, faults in late:
        try:
            _raise(faults)
        except DriverError as error:
            request.error = error


def _raise(faults: Sequence[Fault]) -> None:
    for fault in faults:
        if fault.error is not None:
            raise fault.error()
