"""A disk whose extents lie in a host file in another order: what image formats make of a disk.

For measurements only: there is no safety net and no zeroes, discards or resizing.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import attrs

from xbd.core.driver import (
    API_VERSION,
    BlockDevice,
    Capability,
    Concurrency,
    DriverDescriptor,
    Geometry,
    HostExtent,
    OpenContext,
    absolute_path,
    choice,
    option,
    size,
)
from xbd.core.hostio.files import open_file
from xbd.core.hostio.hostfile import CACHE_NONE, CACHE_WRITEBACK, HostFile, open_host_file


def scatter(count: int) -> list[int]:
    """Where each of a disk's extents lies in the file: the same for the same number of them."""
    places = list(range(count))
    random.Random(count).shuffle(places)
    return places


@attrs.frozen(kw_only=True)
class Options:
    path: Path = option(absolute_path, help="the file")
    extent: int = option(size, help="bytes of each extent; what is left at the end stays there")
    busy: int = option(int, default=-1, help="a CPU that a thread in Python keeps busy; -1: none")
    cache: str = option(choice(CACHE_NONE, CACHE_WRITEBACK), default=CACHE_NONE, help="see xbd(1)")


class ScatteredDevice(BlockDevice):
    def __init__(self, file: HostFile, extent: int) -> None:
        self._file = file
        self._size = os.fstat(file.fd).st_size
        self._extent = extent
        self._places = scatter(self._size // extent)

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            size=self._size,
            physical_block=4096,
            request_alignment=self._file.alignment.offset,
            memory_alignment=self._file.alignment.memory,
        )

    @property
    def capabilities(self) -> Capability:
        return Capability.WRITE | Capability.FLUSH

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        """One extent at a time, as a format that looks into its tables would."""
        number, at = divmod(offset, self._extent)
        if number >= len(self._places):
            return (HostExtent(fd=self._file.fd, offset=offset, length=self._size - offset),)
        place = self._places[number] * self._extent
        return (HostExtent(fd=self._file.fd, offset=place + at, length=self._extent - at),)

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for at, buffer in self._pieces(offset, buffers):
            await self._file.readv(at, [buffer])

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for at, buffer in self._pieces(offset, buffers):
            await self._file.writev(at, [buffer])

    def _pieces(
        self, offset: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, memoryview]]:
        for buffer in buffers:
            rest = buffer
            while rest:
                [extent] = self.resolve(offset, len(rest), for_write=False) or ()
                part = rest[: extent.length]
                yield extent.offset, part
                offset += len(part)
                rest = rest[len(part) :]

    async def flush(self) -> None:
        await self._file.flush()

    async def aclose(self) -> None:
        await self._file.aclose()


@asynccontextmanager
async def open_scattered(context: OpenContext, options: Options) -> AsyncIterator[ScatteredDevice]:
    def opened() -> HostFile:
        return open_host_file(
            options.path,
            lambda flags: open_file(options.path, writable=context.writable, flags=flags),
            name=context.device_id,
            writable=context.writable,
            cache=options.cache,
            run_blocking=context.run_blocking,
        )

    device = ScatteredDevice(await context.run_blocking(opened), options.extent)
    try:
        with ExitStack() as stack:
            if options.busy >= 0:
                stack.enter_context(_busy_thread(options.busy))
            yield device
    finally:
        await device.aclose()


@contextmanager
def _busy_thread(cpu: int) -> Iterator[None]:
    """Takes the interpreter's lock whenever it can, as a driver that computes would."""
    stop = threading.Event()

    def compute() -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        number = 0
        while not stop.is_set():
            for number in range(10_000):
                number *= number

    thread = threading.Thread(target=compute, name="busy")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


DRIVER = DriverDescriptor(
    name="scattered",
    summary="a file's extents in another order, for measurements",
    api_version=API_VERSION,
    options=Options,
    concurrency=Concurrency.PARALLEL,
    capabilities=Capability.WRITE | Capability.FLUSH,
    open=open_scattered,
)
