"""The guest's side of reading and writing: pages, segments, requests, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from xbd.core.blkif import constants, encode
from xbd.core.frontend.errors import FrontendError, RequestFailed
from xbd.core.frontend.memory import DataPages
from xbd.core.frontend.options import FrontendOptions
from xbd.core.frontend.queue import FrontQueue
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import PAGE_SIZE, Domid, GrantRef


class DiskRequests:
    """Rings of one disk, and requests on them.  All offsets and lengths are bytes."""

    def __init__(self, guest: GuestDomain, options: FrontendOptions) -> None:
        self.options = options
        self.backend = Domid(0)
        self.queues: list[FrontQueue] = []
        self.persistent = options.persistent
        self.max_segments = constants.MAX_SEGMENTS
        self._guest = guest
        self._data: DataPages | None = None
        self._turn = 0

    async def make_queues(self, count: int, order: int) -> None:
        """Rings of 2**order pages, each with a port."""
        for _ in range(count):
            port = await self._guest.alloc_port(self.backend)
            self.queues.append(FrontQueue(self._guest, port, self.backend, self.options.abi, order))

    def make_data_pages(self, offered_segments: int) -> None:
        """Pages for data; `offered_segments`: of indirect requests, 0 if there are none."""
        if self.options.indirect_segments > constants.MAX_SEGMENTS < offered_segments:
            self.max_segments = min(self.options.indirect_segments, offered_segments)
        self._data = DataPages(
            self._guest, self.backend, self.options.data_pages, persistent=self.persistent
        )

    async def run_queues(self) -> None:
        """Take answers until cancelled.  Raises `FrontendError` when the backend cheats."""
        async with trio.open_nursery() as nursery:
            for queue in self.queues:
                nursery.start_soon(queue.run)

    def release(self) -> None:
        """Give rings, ports and pages back without a word to the backend.  Idempotent."""
        for queue in self.queues:
            queue.fail(FrontendError("the disk was disconnected"))
            queue.release()
        self.queues.clear()
        if self._data is not None:
            self._data.release()
            self._data = None

    async def read(self, offset: int, length: int) -> bytes:
        """Read bytes; offset and length are multiples of the sector size."""
        data = bytearray(length)
        await self._move(offset, memoryview(data), write=False)
        return bytes(data)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes; offset and length are multiples of the sector size."""
        await self._move(offset, memoryview(data), write=True)

    async def _move(self, offset: int, data: memoryview, *, write: bool) -> None:
        longest = self.max_segments * PAGE_SIZE
        for at in range(0, len(data), longest):
            await self.transfer(offset + at, data[at : at + longest], write=write)

    async def transfer(
        self, offset: int, data: memoryview, *, write: bool, operation: int | None = None
    ) -> None:
        """One request, direct or indirect; `operation` for a write that is a flush or barrier.

        Raises `RequestFailed`.
        """
        assert self._data is not None
        if operation is None:
            operation = constants.WRITE if write else constants.READ
        count = -(-len(data) // PAGE_SIZE)
        tables = 0
        if count > constants.MAX_SEGMENTS:
            tables = -(-count // constants.SEGMENTS_PER_INDIRECT_PAGE)
        pages = await self._data.take(count + tables)
        try:
            if write:
                self._copy(pages[:count], data, to_guest=True)
            with self._data.granted(pages[:count], readonly=write):
                status = await self._send(operation, offset, pages, count, len(data))
            if status != constants.RSP_OKAY:
                raise RequestFailed(f"operation {operation} at byte {offset}", status)
            if not write:
                self._copy(pages[:count], data, to_guest=False)
        finally:
            if self._data is not None:
                self._data.give_back(pages)

    def _copy(self, pages: Sequence[GrantRef], data: memoryview, *, to_guest: bool) -> None:
        for number, ref in enumerate(pages):
            part = data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
            page = self._guest.page(ref)[: len(part)]
            if to_guest:
                page[:] = part
            else:
                part[:] = page

    async def _send(
        self, operation: int, offset: int, pages: Sequence[GrantRef], count: int, length: int
    ) -> int:
        """`pages`: `count` pages of data, then those for an indirect request's tables."""
        assert self._data is not None
        sectors = length // constants.SECTOR
        per_page = PAGE_SIZE // constants.SECTOR
        segments = [
            (ref, 0, min(per_page, sectors - number * per_page) - 1)
            for number, ref in enumerate(pages[:count])
        ]
        sector = offset // constants.SECTOR
        abi = self.options.abi
        tables = pages[count:]
        if not tables:
            return await self._request(
                operation, lambda id_: encode.encode_rw(abi, operation, id_, sector, segments)
            )
        for number, ref in enumerate(tables):
            first = number * constants.SEGMENTS_PER_INDIRECT_PAGE
            packed = encode.pack_indirect_page(
                segments[first : first + constants.SEGMENTS_PER_INDIRECT_PAGE]
            )
            self._guest.page(ref)[: len(packed)] = packed
        with self._data.granted(tables, readonly=True):
            return await self._request(
                operation,
                lambda id_: encode.encode_indirect(abi, operation, id_, sector, count, tables),
            )

    async def flush(self) -> None:
        """Make durable what was written.  Raises `RequestFailed`."""
        await self._control("flush", constants.FLUSH_DISKCACHE)

    async def barrier(self) -> None:
        """An empty WRITE_BARRIER.  Raises `RequestFailed`."""
        await self._control("barrier", constants.WRITE_BARRIER)

    async def _control(self, what: str, operation: int) -> None:
        abi = self.options.abi
        status = await self._request(
            operation, lambda id_: encode.encode_rw(abi, operation, id_, 0, [])
        )
        if status != constants.RSP_OKAY:
            raise RequestFailed(what, status)

    async def discard(self, offset: int, length: int, *, secure: bool = False) -> None:
        """Drop a range.  Raises `RequestFailed`."""
        abi = self.options.abi
        sector, count = offset // constants.SECTOR, length // constants.SECTOR
        status = await self._request(
            constants.DISCARD,
            lambda id_: encode.encode_discard(abi, id_, sector, count, secure=secure),
        )
        if status != constants.RSP_OKAY:
            raise RequestFailed(f"discard at byte {offset}", status)

    async def raw_request(self, operation: int, entry: bytes) -> int:
        """Send any bytes as a request; the id in it must be what the frontend picks, so `entry`
        is a template whose id is replaced.  For tests of hostile guests."""
        at = self.options.abi.id_offset
        return await self._request(
            operation, lambda id_: entry[:at] + id_.to_bytes(8, "little") + entry[at + 8 :]
        )

    async def _request(self, operation: int, encoder: Callable[[int], bytes]) -> int:
        queue = self.queues[self._turn % len(self.queues)]
        self._turn += 1
        return await queue.request(operation, encoder)
