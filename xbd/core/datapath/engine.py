"""File I/O on extents: io_uring where the kernel has it, threads elsewhere.

An engine works for all rings of one connected disk.  It never blocks and never starts a task or
a thread hop per request.
"""

from __future__ import annotations

import abc
import ctypes
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterable, Sequence

import structlog
import trio

from xbd.core.datapath.pages import Work
from xbd.core.datapath.pages.base import WorkOwner
from xbd.core.errors import DeviceBroken
from xbd.core.hostio.uring import IoUring

_log = structlog.get_logger()

URING_ENTRIES = 256
MAX_SEGMENTS = 256
"""Segments of the longest request that an engine takes; longer ones are for the driver."""
_IOVEC_BYTES = 16
SUBMIT_ATTEMPTS = 10_000
CLOSE_SECONDS = 30.0
"""How long a cancelled disk waits for the host's storage before it leaves its memory to it."""
THREADS = 4
"""Thread hops at a time for one disk where io_uring is missing."""


class IoEngine(abc.ABC):
    """Moves the bytes of works between guest pages and host files."""

    name: str
    closing: bool = False
    """Set when `run` ends: what is started now is never finished."""

    @abc.abstractmethod
    def start(self, owner: WorkOwner, work: Work, fd: int, offset: int) -> None:
        """Queue one transfer; `kick` sets off what is queued."""

    @abc.abstractmethod
    def kick(self) -> None:
        """Set off everything queued."""

    @abc.abstractmethod
    async def run(self) -> None:
        """Hand finished works to their owners, until cancelled and nothing is in flight."""

    @property
    @abc.abstractmethod
    def in_flight(self) -> int: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Release the engine.  With work in flight it is leaked: the kernel still uses it."""


class UringEngine(IoEngine):
    """One io_uring; its completions wake a task, or are found right after a submission."""

    name = "io_uring"

    def __init__(self) -> None:
        self._uring = IoUring(URING_ENTRIES)
        room = URING_ENTRIES
        self._table: list[tuple[WorkOwner, Work] | None] = [None] * room
        self._free = list(range(room - 1, -1, -1))
        self._waiting: deque[tuple[WorkOwner, Work, int, int]] = deque()
        self._iovecs = mmap.mmap(-1, room * MAX_SEGMENTS * _IOVEC_BYTES)
        self._anchor = ctypes.c_char.from_buffer(self._iovecs)
        self._iovecs_address = ctypes.addressof(self._anchor)
        self._words = memoryview(self._iovecs).cast("Q")

    @property
    def in_flight(self) -> int:
        return len(self._table) - len(self._free) + len(self._waiting)

    def start(self, owner: WorkOwner, work: Work, fd: int, offset: int) -> None:
        if not self._free or self._waiting:
            self._waiting.append((owner, work, fd, offset))
            return
        self._queue(owner, work, fd, offset)

    def _queue(self, owner: WorkOwner, work: Work, fd: int, offset: int) -> None:
        uring = self._uring
        tag = self._free.pop()
        self._table[tag] = (owner, work)
        parts = work.parts
        if len(parts) == 1:
            _, _, length, address = parts[0]
            if work.request.write:
                uring.write(fd, address, length, offset, tag)
            else:
                uring.read(fd, address, length, offset, tag)
            return
        at = tag * MAX_SEGMENTS * 2
        address, count = self._fill(at, parts)
        if work.request.write:
            uring.writev(fd, address, count, offset, tag)
        else:
            uring.readv(fd, address, count, offset, tag)

    def _fill(self, at: int, parts: Sequence[tuple[memoryview, int, int, int]]) -> tuple[int, int]:
        """Write the iovecs, neighbours in memory as one; where they are, and how many."""
        words = self._words
        first = at
        end = -1
        for _, _, length, address in parts:
            if address == end:
                words[at - 1] += length
            else:
                words[at] = address
                words[at + 1] = length
                at += 2
            end = address + length
        return self._iovecs_address + first * 8, (at - first) // 2

    def kick(self) -> None:
        self._submit()
        self.reap()

    def _submit(self) -> None:
        """Hand the queue to the kernel, all of it: one short of memory is asked again."""
        for _ in range(SUBMIT_ATTEMPTS):
            self._uring.submit()
            if not self._uring.queued:
                return
        raise DeviceBroken("the kernel takes no more I/O requests: it is out of memory")

    def reap(self) -> None:
        """Hand over what is finished; fill up with what waits."""
        while completions := self._uring.reap():
            table = self._table
            free = self._free
            finished = []
            for tag, result in completions:
                entry = table[tag]
                assert entry is not None
                table[tag] = None
                free.append(tag)
                finished.append((entry[0], entry[1], result == entry[1].request.length))
            if self._waiting:
                while self._waiting and free:
                    self._queue(*self._waiting.popleft())
                self._submit()
            _hand_over(finished)

    async def run(self) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(self._uring.fd)
                self.reap()
        finally:
            self.closing = True
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                while self.in_flight:
                    await trio.lowlevel.wait_readable(self._uring.fd)
                    self.reap()

    def close(self) -> None:
        if self.in_flight:
            self._uring.abandon()
            _abandoned.append(self)
            return
        self._uring.close()
        self._words.release()
        del self._anchor
        self._iovecs.close()


_abandoned: list[UringEngine] = []
"""Engines whose memory the kernel may still use, for as long as the process lives."""


class ThreadEngine(IoEngine):
    """A few thread hops per batch, for kernels without io_uring."""

    name = "threads"

    def __init__(self) -> None:
        self._queued: list[tuple[WorkOwner, Work, int, int]] = []
        self._running = 0
        self._limiter = trio.CapacityLimiter(THREADS)
        self._wake = trio.Event()

    @property
    def in_flight(self) -> int:
        return self._running + len(self._queued)

    def start(self, owner: WorkOwner, work: Work, fd: int, offset: int) -> None:
        self._queued.append((owner, work, fd, offset))

    def kick(self) -> None:
        if self._queued:
            self._wake.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    await self._wake.wait()
                    self._spread(nursery)
            finally:
                self.closing = True
                self._spread(nursery)

    def _spread(self, nursery: trio.Nursery) -> None:
        self._wake = trio.Event()
        works, self._queued = self._queued, []
        self._running += len(works)
        for part in range(min(THREADS, len(works))):
            nursery.start_soon(self._hop, works[part::THREADS])

    async def _hop(self, works: Sequence[tuple[WorkOwner, Work, int, int]]) -> None:
        with trio.CancelScope(shield=True):
            finished = await trio.to_thread.run_sync(_transfer_all, works, limiter=self._limiter)
        self._running -= len(works)
        _hand_over(finished)

    def close(self) -> None:
        return


def _transfer_all(
    works: Sequence[tuple[WorkOwner, Work, int, int]],
) -> list[tuple[WorkOwner, Work, bool]]:
    """In a thread: all transfers, one after the other."""
    return [(owner, work, _transfer(work, fd, offset)) for owner, work, fd, offset in works]


def _transfer(work: Work, fd: int, offset: int) -> bool:
    try:
        if work.request.write:
            return os.pwritev(fd, work.buffers(), offset) == work.request.length
        return os.preadv(fd, work.buffers(), offset) == work.request.length
    except OSError:
        return False  # the driver's async method tries again and says what is wrong


def _hand_over(finished: Iterable[tuple[WorkOwner, Work, bool]]) -> None:
    by_owner: dict[WorkOwner, tuple[list[Work], list[Work]]] = {}
    for owner, work, good in finished:
        lists = by_owner.get(owner)
        if lists is None:
            lists = by_owner[owner] = ([], [])
        lists[0 if good else 1].append(work)
    for owner, (good_works, bad_works) in by_owner.items():
        owner.completed(good_works, bad_works)


def make_engine() -> IoEngine:
    """The best engine that this kernel allows."""
    try:
        return UringEngine()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.ENOMEM, errno.EMFILE):
            raise
        _log.info("io_uring is not available, using threads", reason=os.strerror(error.errno or 0))
        return ThreadEngine()
