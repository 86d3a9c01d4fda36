"""Transfers between buffers and host files: io_uring where the kernel has it, else threads.

An engine works for all connections of one export.  It never blocks, and starts neither a task
nor a thread hop per transfer.
"""

from __future__ import annotations

import abc
import logging
import os
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import attrs
import trio

from xbd.core.hostio.uring import UNAVAILABLE, IoUring
from xbd.core.nbd.buffers import Buffer
from xbd.core.nbd.poller import READ, Poller

_log = logging.getLogger(__name__)

_ENTRIES: Final = 256
_THREADS: Final = 4
"""Thread hops at a time where io_uring is missing."""
CLOSE_SECONDS: Final = 30.0
"""How long the end waits for the host's storage before it leaves its memory to it."""


class Owner(Protocol):
    """Whoever is told of the end of transfers."""

    def completed(self, good: Sequence[Transfer], bad: Sequence[Transfer]) -> None:
        """These have ended; what is bad was not moved whole, for whatever reason."""


@attrs.define(eq=False)
class Transfer:
    """From or to the disk's range at `offset`."""

    owner: Owner
    write: bool
    offset: int
    length: int
    buffer: Buffer
    data: memoryview
    """The first `length` bytes of `buffer`."""
    cookie: int
    """What the client knows the request by."""
    flags: int
    """Of the command."""


class Engine(abc.ABC):
    """Moves the bytes of transfers."""

    name: str

    @abc.abstractmethod
    def start(self, transfer: Transfer, fd: int, offset: int) -> None:
        """Queue a transfer from or to the file open as `fd`; `kick` sets off what is queued."""

    @abc.abstractmethod
    def kick(self) -> None:
        """Set off everything queued; may tell of ends at once."""

    @abc.abstractmethod
    async def run(self) -> None:
        """Tell of ends, until cancelled and nothing is in flight."""

    @property
    @abc.abstractmethod
    def in_flight(self) -> int: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Release the engine.  With transfers in flight it is leaked: the kernel still uses it."""


class UringEngine(Engine):
    """One io_uring; its completions wake a task, or are found right after a submission."""

    name = "io_uring"

    def __init__(self, poller: Poller) -> None:
        self._uring = IoUring(_ENTRIES)
        self._poller = poller
        self._table: list[Transfer | None] = [None] * _ENTRIES
        self._free = list(range(_ENTRIES - 1, -1, -1))
        self._waiting: deque[tuple[Transfer, int, int]] = deque()

    @property
    def in_flight(self) -> int:
        return len(self._table) - len(self._free) + len(self._waiting)

    def start(self, transfer: Transfer, fd: int, offset: int) -> None:
        if not self._free or self._waiting:
            self._waiting.append((transfer, fd, offset))
            return
        tag = self._free.pop()
        self._table[tag] = transfer
        queue = self._uring.write if transfer.write else self._uring.read
        queue(fd, transfer.buffer.address, transfer.length, offset, tag)

    def kick(self) -> None:
        self._uring.submit_all()
        self._reap()

    def _reap(self) -> None:
        while completions := self._uring.reap():
            finished = []
            for tag, result in completions:
                transfer = self._table[tag]
                assert transfer is not None
                self._table[tag] = None
                self._free.append(tag)
                finished.append((transfer, result == transfer.length))
            if self._waiting:
                waiting, self._waiting = self._waiting, deque()
                for entry in waiting:
                    self.start(*entry)
                self._uring.submit_all()
            _hand_over(finished)

    async def run(self) -> None:
        self._poller.watch(self._uring.fd, READ, self._ready)
        try:
            await trio.sleep_forever()
        finally:
            self._poller.watch(self._uring.fd, 0, self._ready)
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                while self.in_flight:
                    await trio.lowlevel.wait_readable(self._uring.fd)
                    self._reap()

    def _ready(self, _events: int) -> None:
        self._reap()

    def close(self) -> None:
        if self.in_flight:
            _log.error("storage does not answer; memory of %d requests is lost", self.in_flight)
            self._uring.abandon()
            _abandoned.append(self)
        else:
            self._uring.close()


_abandoned: list[UringEngine] = []
"""Engines whose buffers the kernel may still use, for as long as the process lives."""


class ThreadEngine(Engine):
    """A few thread hops per batch, for kernels without io_uring."""

    name = "threads"

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._queued: list[tuple[Transfer, int, int]] = []
        self._running = 0
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._wake = trio.Event()

    @property
    def in_flight(self) -> int:
        return self._running + len(self._queued)

    def start(self, transfer: Transfer, fd: int, offset: int) -> None:
        self._queued.append((transfer, fd, offset))
        self._poller.tasks += 1

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
                self._spread(nursery)

    def _spread(self, nursery: trio.Nursery) -> None:
        self._wake = trio.Event()
        queued, self._queued = self._queued, []
        self._running += len(queued)
        for part in range(min(_THREADS, len(queued))):
            nursery.start_soon(self._hop, queued[part::_THREADS])

    async def _hop(self, queued: Sequence[tuple[Transfer, int, int]]) -> None:
        with trio.CancelScope(shield=True):  # the thread uses the buffers
            finished = await trio.to_thread.run_sync(_move_all, queued, limiter=self._limiter)
        self._running -= len(queued)
        self._poller.tasks -= len(queued)
        _hand_over(finished)

    def close(self) -> None:
        return


def _move_all(queued: Sequence[tuple[Transfer, int, int]]) -> list[tuple[Transfer, bool]]:
    """In a thread: all transfers, one after the other."""
    return [(transfer, _move(transfer, fd, offset)) for transfer, fd, offset in queued]


def _move(transfer: Transfer, fd: int, offset: int) -> bool:
    move = os.pwritev if transfer.write else os.preadv
    try:
        return move(fd, [transfer.data], offset) == transfer.length
    except OSError:
        return False  # the driver's own method tries again and says what is wrong


def _hand_over(finished: Iterable[tuple[Transfer, bool]]) -> None:
    by_owner: dict[Owner, tuple[list[Transfer], list[Transfer]]] = {}
    for transfer, good in finished:
        lists = by_owner.get(transfer.owner)
        if lists is None:
            lists = by_owner[transfer.owner] = ([], [])
        lists[0 if good else 1].append(transfer)
    for owner, (good_ones, bad_ones) in by_owner.items():
        owner.completed(good_ones, bad_ones)


def make_engine(poller: Poller) -> Engine:
    """The best engine that this kernel allows."""
    try:
        return UringEngine(poller)
    except OSError as error:
        if error.errno not in UNAVAILABLE:
            raise
        _log.info("io_uring is not available, using threads: %s", error.strerror)
        return ThreadEngine(poller)
