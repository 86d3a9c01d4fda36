"""A disk as a directory of chunks: a file per MiB, and none where nothing was written yet."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from xbd.core.driver import (
    API_VERSION,
    BlockDevice,
    Capability,
    Concurrency,
    DriverDescriptor,
    Extent,
    Geometry,
    HostExtent,
    OpenContext,
    absolute_path,
    option,
    size,
)

CHUNK = 1 << 20


@attrs.frozen(kw_only=True)
class Options:
    path: Path = option(absolute_path, help="the directory; it must exist")
    size: int = option(size, help="bytes that the guest sees")


class ChunkDevice(BlockDevice):
    def __init__(self, context: OpenContext, options: Options) -> None:
        self._context = context
        self._path = options.path
        self._size = options.size
        self._flags = (os.O_RDWR if context.writable else os.O_RDONLY) | os.O_CLOEXEC
        self._directory = -1
        self._chunks: dict[int, int] = {}  # number of the chunk -> its open file

    @property
    def geometry(self) -> Geometry:
        return Geometry(size=self._size, physical_block=4096, discard_granularity=CHUNK)

    @property
    def capabilities(self) -> Capability:
        if not self._context.writable:
            return Capability.NONE
        return Capability.WRITE | Capability.FLUSH | Capability.DISCARD

    async def open(self) -> None:
        self._directory, self._chunks = await self._context.run_blocking(self._open_all)

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        parts = [(self._chunks.get(n), at, part) for n, at, part in _split(offset, buffers)]
        await self._context.run_blocking(_read, parts)

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        parts = list(_split(offset, buffers))
        for number, _, _ in parts:
            if number not in self._chunks:
                fd = await self._context.run_blocking(self._create, number)
                self._chunks[number] = fd
        await self._context.run_blocking(_write, [(self._chunks[n], at, p) for n, at, p in parts])

    async def flush(self) -> None:
        await self._context.run_blocking(_sync, [*self._chunks.values(), self._directory])

    async def discard(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            end = extent.offset + extent.length
            for number in range(extent.offset // CHUNK, -(-end // CHUNK)):
                if number in self._chunks:
                    await self._drop(number)

    async def _drop(self, number: int) -> None:
        with trio.CancelScope(shield=True):  # half a removal would leak the file
            fd = self._chunks.pop(number)  # 1. resolve does not answer with it any more
            await self._context.invalidate(number * CHUNK, CHUNK)  # 2. nobody else uses it
            os.close(fd)  # 3. now it can go
            await self._context.run_blocking(os.unlink, self._name(number))

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        fd = self._chunks.get(offset // CHUNK)
        if fd is None or (for_write and not self._context.writable):
            return None
        at = offset % CHUNK
        return [HostExtent(fd=fd, offset=at, length=min(CHUNK - at, self._size - offset))]

    async def aclose(self) -> None:
        while self._chunks:
            os.close(self._chunks.popitem()[1])
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    # What follows runs in threads: files and bytes only, never self._chunks.

    def _name(self, number: int) -> Path:
        return self._path / f"{number:08x}"

    def _open_all(self) -> tuple[int, dict[int, int]]:
        directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        chunks = {}
        try:
            lock = fcntl.LOCK_EX if self._context.writable else fcntl.LOCK_SH
            fcntl.flock(directory, lock | fcntl.LOCK_NB)
            for number in range(-(-self._size // CHUNK)):
                if self._name(number).exists():
                    chunks[number] = os.open(self._name(number), self._flags)
        except BaseException:
            for fd in (directory, *chunks.values()):
                os.close(fd)
            raise
        return directory, chunks

    def _create(self, number: int) -> int:
        fd = os.open(self._name(number), self._flags | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(fd, CHUNK)
        return fd


def _split(offset: int, buffers: Sequence[memoryview]) -> Iterator[tuple[int, int, memoryview]]:
    """Chunk, place in it, and buffer: no buffer reaches over the end of its chunk."""
    for buffer in buffers:
        done = 0
        while done < len(buffer):
            number, at = divmod(offset, CHUNK)
            part = buffer[done : done + CHUNK - at]
            yield number, at, part
            done += len(part)
            offset += len(part)


def _read(parts: Sequence[tuple[int | None, int, memoryview]]) -> None:
    for fd, at, buffer in parts:
        got = 0
        while fd is not None and got < len(buffer):
            step = os.preadv(fd, [buffer[got:]], at + got)
            if not step:
                raise OSError(f"a chunk is shorter than {CHUNK} bytes")
            got += step
        if fd is None:
            buffer[:] = bytes(len(buffer))


def _write(parts: Sequence[tuple[int, int, memoryview]]) -> None:
    for fd, at, buffer in parts:
        done = 0
        while done < len(buffer):
            done += os.pwritev(fd, [buffer[done:]], at + done)


def _sync(fds: Sequence[int]) -> None:
    for fd in fds:
        os.fsync(fd)


@asynccontextmanager
async def open_chunks(context: OpenContext, options: Options) -> AsyncIterator[ChunkDevice]:
    device = ChunkDevice(context, options)
    await device.open()
    try:
        yield device
    finally:
        await device.aclose()


DRIVER = DriverDescriptor(
    name="chunks",
    summary="a disk as a directory of chunks",
    api_version=API_VERSION,
    options=Options,
    concurrency=Concurrency.SERIAL,
    capabilities=Capability.WRITE | Capability.FLUSH | Capability.DISCARD,
    open=open_chunks,
)
