"""File I/O on extents: io_uring where the kernel has it, threads elsewhere.

An engine works for all rings of one connected disk.  It never blocks and never starts a task or
a thread hop per request.
"""

from __future__ import annotations

import abc
import ctypes
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import attrs
import structlog
import trio

from xbd.core.datapath.extents import Piece
from xbd.core.datapath.pages import Work
from xbd.core.datapath.pages.base import WorkOwner
from xbd.core.hostio.uring import UNAVAILABLE, IoUring

_log = structlog.get_logger()

URING_ENTRIES = 256
MAX_SEGMENTS = 256
"""Segments of the longest request that an engine takes; longer ones are for the driver."""
_IOVEC_BYTES = 16
CLOSE_SECONDS = 30.0
"""How long a cancelled disk waits for the host's storage before it leaves its memory to it."""
MAX_PIECES = 64
"""Places in host files that one request may be spread over; more are for the driver."""
THREADS = 4
"""Thread hops at a time for one disk where io_uring is missing."""


Part = tuple[memoryview, int, int, int]
"""As in `Work.parts`."""


@attrs.define(slots=True, eq=False)
class _Split:
    """A transfer in several places."""

    left: int
    """Pieces that are not finished."""
    good: bool = True
    """Whether all that are finished have moved all their bytes."""


Operation = tuple[WorkOwner, Work, int, int, int, Sequence[Part], _Split | None]
"""Of the kernel: a transfer, or a piece of one; file, place in it, length and memory."""


class IoEngine(abc.ABC):
    """Moves the bytes of works between guest pages and host files."""

    name: str
    closing: bool = False
    """Set when `run` ends: what is started now is never finished."""

    @abc.abstractmethod
    def start(self, owner: WorkOwner, work: Work, fd: int, offset: int) -> None:
        """Queue one transfer; `kick` sets off what is queued."""

    @abc.abstractmethod
    def start_split(self, owner: WorkOwner, work: Work, pieces: Sequence[Piece]) -> None:
        """As `start`, of a transfer in several places; it is finished when all are."""

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
        self._table: list[tuple[WorkOwner, Work, int, _Split | None] | None] = [None] * room
        self._free = list(range(room - 1, -1, -1))
        self._waiting: deque[Operation] = deque()
        self._iovecs = mmap.mmap(-1, room * MAX_SEGMENTS * _IOVEC_BYTES)
        self._anchor = ctypes.c_char.from_buffer(self._iovecs)
        self._iovecs_address = ctypes.addressof(self._anchor)
        self._words = memoryview(self._iovecs).cast("Q")

    @property
    def in_flight(self) -> int:
        return len(self._table) - len(self._free) + len(self._waiting)

    def start(self, owner: WorkOwner, work: Work, fd: int, offset: int) -> None:
        operation = (owner, work, fd, offset, work.request.length, work.parts, None)
        if not self._free or self._waiting:
            self._waiting.append(operation)
            return
        self._queue(*operation)

    def start_split(self, owner: WorkOwner, work: Work, pieces: Sequence[Piece]) -> None:
        split = _Split(len(pieces))
        for (fd, offset, length), parts in zip(pieces, _cut(work.parts, pieces), strict=True):
            self._waiting.append((owner, work, fd, offset, length, parts, split))
        self._queue_waiting()

    def _queue_waiting(self) -> None:
        while self._waiting and self._free:
            self._queue(*self._waiting.popleft())

    def _queue(
        self,
        owner: WorkOwner,
        work: Work,
        fd: int,
        offset: int,
        length: int,
        parts: Sequence[Part],
        split: _Split | None,
    ) -> None:
        uring = self._uring
        tag = self._free.pop()
        self._table[tag] = (owner, work, length, split)
        if len(parts) == 1:
            address = parts[0][3]
            if work.request.write:
                uring.write(fd, address, length, offset, tag)
            else:
                uring.read(fd, address, length, offset, tag)
            return
        address, count = self._fill(tag * MAX_SEGMENTS * 2, parts)
        if work.request.write:
            uring.writev(fd, address, count, offset, tag)
        else:
            uring.readv(fd, address, count, offset, tag)

    def _fill(self, at: int, parts: Sequence[Part]) -> tuple[int, int]:
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
        self._uring.submit_all()
        self.reap()

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
                owner, work, length, split = entry
                good = result == length
                if split is not None:
                    good = split.good = split.good and good
                    split.left -= 1
                    if split.left:
                        continue
                finished.append((owner, work, good))
            if self._waiting:
                self._queue_waiting()
                self._uring.submit_all()
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
        self._queued: list[tuple[WorkOwner, Work, Sequence[Piece]]] = []
        self._running = 0
        self._limiter = trio.CapacityLimiter(THREADS)
        self._wake = trio.Event()

    @property
    def in_flight(self) -> int:
        return self._running + len(self._queued)

    def start(self, owner: WorkOwner, work: Work, fd: int, offset: int) -> None:
        self._queued.append((owner, work, ((fd, offset, work.request.length),)))

    def start_split(self, owner: WorkOwner, work: Work, pieces: Sequence[Piece]) -> None:
        self._queued.append((owner, work, pieces))

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

    async def _hop(self, works: Sequence[tuple[WorkOwner, Work, Sequence[Piece]]]) -> None:
        with trio.CancelScope(shield=True):
            finished = await trio.to_thread.run_sync(_transfer_all, works, limiter=self._limiter)
        self._running -= len(works)
        _hand_over(finished)

    def close(self) -> None:
        return


def _transfer_all(
    works: Sequence[tuple[WorkOwner, Work, Sequence[Piece]]],
) -> list[tuple[WorkOwner, Work, bool]]:
    """In a thread: all transfers, one after the other."""
    return [(owner, work, _transfer(work, pieces)) for owner, work, pieces in works]


def _transfer(work: Work, pieces: Sequence[Piece]) -> bool:
    move = os.pwritev if work.request.write else os.preadv
    cut = [
        [view[start : start + size] for view, start, size, _ in parts]
        for parts in _cut(work.parts, pieces)
    ]
    work.views = [view for views in cut for view in views]
    try:
        return all(
            move(fd, views, offset) == length
            for (fd, offset, length), views in zip(pieces, cut, strict=True)
        )
    except OSError:
        return False  # the driver's async method tries again and says what is wrong


def _cut(parts: Sequence[Part], pieces: Sequence[Piece]) -> Iterator[list[Part]]:
    """A transfer's memory, piece by piece."""
    rest = deque(parts)
    for _, _, length in pieces:
        mine: list[Part] = []
        while length:
            part = rest.popleft()
            view, start, size, address = part
            if size > length:
                rest.appendleft((view, start + length, size - length, address + length))
                part = (view, start, length, address)
                size = length
            mine.append(part)
            length -= size
        yield mine


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
        if error.errno not in UNAVAILABLE:
            raise
        _log.info("io_uring is not available, using threads", reason=os.strerror(error.errno or 0))
        return ThreadEngine()
