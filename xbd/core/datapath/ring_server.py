"""One ring: requests in, answers out.

Per wake-up the whole batch is copied from the ring, journalled, decoded and set off; finished
requests are answered with one push and one decision about an event.  Answers leave in any order,
each exactly once.  What an extent covers is moved by the engine (or at once, where the host's page
cache has it); the rest goes to the driver's async methods in tasks of their own.

Order.  Requests have none, but for these (blkif.h): a FLUSH makes durable what was answered
before it arrived; a WRITE_BARRIER waits for everything before it, is durable when answered, and
holds back everything after it.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Sequence

import attrs
import structlog
import trio

from xbd.core.blkif import (
    BackRing,
    Decoder,
    Discard,
    Flush,
    Indirect,
    Rejected,
    Transfer,
    constants,
)
from xbd.core.datapath.config import DiskStats
from xbd.core.datapath.engine import IoEngine
from xbd.core.datapath.extents import ExtentCache
from xbd.core.datapath.journal import Journal
from xbd.core.datapath.pages import GuestPages, Work
from xbd.core.driver import DeviceAccess, Extent
from xbd.core.errors import BadRequest, Disposition, GrantFailed, XbdError
from xbd.core.hypervisor import EventChannel
from xbd.core.ratelimit import RateLimit
from xbd.core.units import PAGE_SIZE

_log = structlog.get_logger()

Request = Transfer | Flush | Discard | Indirect | Rejected
Item = tuple[int, Request]
"""A journal slot and its request."""
Answer = tuple[int, int, int, int]
"""Journal slot, id, operation, status."""

INLINE_BYTES = 128 * 1024
"""Reads up to this length are tried on the host's page cache without leaving the task."""
SPURIOUS_EVENTS = 16
"""Wake-ups in a row without work before the ring backs off."""
MAX_BACK_OFF_SECONDS = 0.02

_OKAY = constants.RSP_OKAY
_ERROR = constants.RSP_ERROR


@attrs.define(eq=False)
class RingServer:
    """Serves one ring until cancelled.  All of it runs in one trio task or its upcalls."""

    name: str
    ring: BackRing
    decoder: Decoder
    journal: Journal
    pages: GuestPages
    channel: EventChannel
    access: DeviceAccess
    extents: ExtentCache
    engine: IoEngine
    stats: DiskStats
    log_limit: RateLimit = attrs.field(factory=RateLimit)
    nursery: trio.Nursery = attrs.field(init=False)
    """Where upcalls run; set before `run`."""
    _inline: bool = attrs.field(default=False, init=False)
    """Whether some file of the disk goes through the host's page cache."""
    _open: dict[int, Request | Work] = attrs.field(factory=dict, init=False)
    """Requests that were set off and have no answer yet, by journal slot."""
    _backlog: deque[Item] = attrs.field(factory=deque, init=False)
    """Requests that wait: for memory, or behind a barrier."""
    _barrier: bool = attrs.field(default=False, init=False)
    _quiet: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)
    _cached: dict[int, bool] = attrs.field(factory=dict, init=False)
    """Whether an fd goes through the host's page cache."""
    _alignment: int = attrs.field(init=False)
    _memory_alignment: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        geometry = self.access.geometry
        self._alignment = geometry.request_alignment
        self._memory_alignment = geometry.memory_alignment

    # -- wake-ups ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve.  Raises `RingCorrupt`."""
        idle = 0
        self.channel.notify()  # events may have been lost before we were here
        while True:
            idle = 0 if self.serve() else idle + 1
            if self.ring.final_check():
                await trio.lowlevel.checkpoint()
                continue
            if idle > SPURIOUS_EVENTS:
                await trio.sleep(min(0.001 * (idle - SPURIOUS_EVENTS), MAX_BACK_OFF_SECONDS))
            self.channel.unmask()
            await trio.lowlevel.wait_readable(self.channel.fd)
            self.channel.take()

    def serve(self) -> bool:
        """One batch; False if there was none.  Raises `RingCorrupt`."""
        entries = self.ring.take()
        if not entries:
            return False
        count = len(entries) // self.decoder.abi.request_size
        slots = self.journal.record((self.ring.req_cons - count) & 0xFFFFFFFF, entries)
        items = zip(slots, self.decoder.decode_batch(entries), strict=True)
        self.pages.batch += 1
        self._backlog.extend(items)
        self._advance()
        return True

    @property
    def in_flight(self) -> int:
        """Requests consumed and not answered."""
        return len(self._open) + len(self._backlog)

    async def drained(self) -> None:
        """Wait until every consumed request is answered."""
        while self.in_flight:
            await self._quiet.park()

    def transfers(self, offset: int, length: int) -> set[Work]:
        """Transfers through extents, in flight, that touch a range."""
        end = offset + length
        return {
            work
            for work in self._open.values()
            if isinstance(work, Work)
            and work.direct
            and work.request.offset < end
            and offset < work.request.offset + work.request.length
        }

    async def one_answered(self) -> None:
        """Wait until at least one more request is answered."""
        await self._quiet.park()

    # -- requests out -----------------------------------------------------------------------

    def _advance(self) -> None:
        """Set off waiting requests, as far as they can go now."""
        backlog = self._backlog
        if backlog and self._open and self._is_barrier(backlog[0][1]):
            return
        answers: list[Answer] = []
        works: list[Work] = []
        while backlog and not self._barrier:
            slot, request = backlog.popleft()
            if type(request) is Indirect:
                request = self._expand(request)
            if type(request) is Transfer:
                if self._inline and not request.write and self._read_cached(request):
                    answers.append((slot, request.id, request.operation, _OKAY))
                elif not self._prepare(slot, request, works, answers):
                    backlog.appendleft((slot, request))
                    break
            elif type(request) is Rejected:
                answers.append(self._refuse(slot, request))
            elif isinstance(request, Flush | Discard):
                if self._is_barrier(request) and not self._take_barrier(works):
                    backlog.appendleft((slot, request))
                    break
                self._open[slot] = request
                self.nursery.start_soon(self._control, slot, request)
        if works or answers:
            self._start(works, answers)

    def _read_cached(self, request: Transfer) -> bool:
        """Read now from the host's page cache into resident pages; False: not possible."""
        length = request.length
        found = self._find(request)
        if found is None or length > INLINE_BYTES or not self._cached[found[2]]:
            return False
        resident = self.pages.resident
        batch = self.pages.batch
        buffers = []
        for ref, first, size in request.segments:
            page = resident.get(ref)
            if page is None:
                return False
            page.used = batch
            buffers.append(page.view if size == PAGE_SIZE else page.view[first : first + size])
        try:
            done = os.preadv(found[2], buffers, request.offset + found[3], os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            self._cached[found[2]] = False  # no RWF_NOWAIT on this file
            return False
        if done != length:
            return False
        self.stats.rd_req += 1
        self.stats.rd_bytes += length
        return True

    def _prepare(
        self, slot: int, request: Transfer, works: list[Work], answers: list[Answer]
    ) -> bool:
        """Give a transfer its pages; False: it has to wait."""
        if request.barrier and not self._take_barrier(works):
            return False
        try:
            work = self.pages.attach(slot, request)
        except GrantFailed as error:
            self._note(error)
            answers.append((slot, request.id, request.operation, _ERROR))
            self._barrier = self._barrier and not request.barrier
            return True
        if work is None:
            self._barrier = self._barrier and not request.barrier
            return False
        self._open[slot] = work
        works.append(work)
        return True

    def _is_barrier(self, request: Request) -> bool:
        return (type(request) is Flush and request.operation == constants.WRITE_BARRIER) or (
            type(request) is Transfer and request.barrier
        )

    def _take_barrier(self, works: Sequence[Work]) -> bool:
        """Begin a barrier if nothing is in flight before it."""
        if self._open or works or self._barrier:
            return False
        self._barrier = True
        return True

    def _start(self, works: list[Work], answers: list[Answer]) -> None:
        """Set off transfers that have their pages, and publish what is answered already."""
        self.pages.fetch(works)
        queued = False
        failed = []
        for work in works:
            if work.status != _OKAY:
                failed.append(work)
                continue
            request = work.request
            found = None
            if not (request.barrier or request.flush) and self._aligned(work):
                found = self._find(request)
            if found is None:
                self.nursery.start_soon(self._upcall, work)
            else:
                work.direct = True
                self.engine.start(self, work, found[2], request.offset + found[3])
                queued = True
        if failed:
            answers.extend(self._finish(failed))
        if answers:
            self._answer(answers)
        if queued:
            self.engine.kick()

    def _find(self, request: Transfer) -> tuple[int, int, int, int] | None:
        found = self.extents.hot[request.write]
        if request.offset < found[0] or request.offset + request.length > found[1]:
            entry = self.extents.find(request.offset, request.length, for_write=request.write)
            if entry is None:
                return None
            found = entry
            if found[2] not in self._cached:
                flags = fcntl.fcntl(found[2], fcntl.F_GETFL)
                self._cached[found[2]] = not flags & os.O_DIRECT
                self._inline = self._inline or not flags & os.O_DIRECT
        return found

    def _aligned(self, work: Work) -> bool:
        """Whether the host takes the transfer as it is."""
        if (work.request.offset | work.request.length) % self._alignment:
            return False
        if self._memory_alignment <= constants.SECTOR:
            return True
        return not any((at | size) % self._memory_alignment for _, _, size, at in work.parts)

    def _expand(self, request: Indirect) -> Transfer | Rejected:
        try:
            return self.decoder.expand(request, self.pages.read_indirect(request))
        except (BadRequest, GrantFailed) as error:
            return Rejected(request.id, request.operation, _ERROR, str(error))

    # -- upcalls ----------------------------------------------------------------------------

    async def _upcall(self, work: Work) -> None:
        """A transfer through the driver's async methods.  Raises what closes the device."""
        request = work.request
        fatal = None
        try:
            if request.flush or request.barrier:
                await self.access.flush()
            if request.write:
                await self.access.writev(request.offset, work.buffers())
            else:
                await self.access.readv(request.offset, work.buffers())
            if request.barrier:
                await self.access.flush()
        except XbdError as error:
            work.status, fatal = self._judge(error)
        self._answer(self._finish([work]), barrier=request.barrier)
        if fatal is not None:
            raise fatal

    async def _control(self, slot: int, request: Flush | Discard) -> None:
        """A request without data.  Raises what closes the device."""
        status = _OKAY
        length = 0
        fatal = None
        try:
            if isinstance(request, Flush):
                await self.access.flush()
            else:
                length = request.length
                await self.access.discard([Extent(offset=request.offset, length=length)])
        except XbdError as error:
            status, fatal = self._judge(error)
        self.stats.count(request.operation, length)
        answer = (slot, request.id, request.operation, status)
        self._answer([answer], barrier=self._is_barrier(request))
        if fatal is not None:
            raise fatal

    def _judge(self, error: XbdError) -> tuple[int, XbdError | None]:
        """What the guest is told, and the error again if it means more than an answer."""
        self._note(error)
        if error.disposition is Disposition.ANSWER_UNSUPPORTED:
            return constants.RSP_EOPNOTSUPP, None
        return _ERROR, None if error.disposition is Disposition.ANSWER_ERROR else error

    # -- answers in -------------------------------------------------------------------------

    def completed(self, good: Sequence[Work], bad: Sequence[Work]) -> None:
        """From the engine.  What it could not move whole, the driver's methods try again."""
        for work in bad:
            work.direct = False
            self.nursery.start_soon(self._upcall, work)
        if good:
            self._answer(self._finish(good))
        elif self._quiet:
            self._quiet.unpark_all()

    def _finish(self, works: Sequence[Work]) -> list[Answer]:
        self.pages.finish(works)
        answers = []
        stats = self.stats
        for work in works:
            request = work.request
            if request.write:
                stats.wr_req += 1
                stats.wr_bytes += request.length
            else:
                stats.rd_req += 1
                stats.rd_bytes += request.length
            answers.append((work.slot, request.id, request.operation, work.status))
        return answers

    def _answer(self, answers: Sequence[Answer], *, barrier: bool = False) -> None:
        """Publish answers, then go on with what waited for them."""
        ring = self.ring
        slots = [answer[0] for answer in answers]
        self.journal.answering(slots, ring.rsp_prod_pvt)
        is_open = self._open
        for slot, request_id, operation, status in answers:
            ring.answer(request_id, operation, status)
            is_open.pop(slot, None)
            if status:
                self.stats.errors += 1
        if ring.push():
            self.channel.notify()
        self.journal.clear(slots)
        if barrier:
            self._barrier = False
        if self._backlog:
            self._advance()
        if self._quiet:
            self._quiet.unpark_all()

    def _refuse(self, slot: int, request: Rejected) -> Answer:
        self._log(request.reason)
        return slot, request.id, request.operation, request.status

    def _note(self, error: XbdError) -> None:
        self._log(str(error))

    def _log(self, reason: str) -> None:
        self.stats.last_error = reason
        held = self.log_limit.allows()
        if held is not None:
            _log.warning("request failed", device=self.name, reason=reason, suppressed=held)

    def release(self) -> None:
        """Give the guest's pages back.  Only when nothing runs and the engine is idle."""
        works = [work for work in self._open.values() if isinstance(work, Work)]
        self.pages.finish(works)
        self.pages.close()
        self._open.clear()
        self._backlog.clear()
