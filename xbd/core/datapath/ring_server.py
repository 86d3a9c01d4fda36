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
    Request,
    Single,
    Transfer,
    constants,
    whole,
)
from xbd.core.datapath.cached_reads import Answer, CachedReads, Item
from xbd.core.datapath.chunk_map import KNOWN
from xbd.core.datapath.config import DiskStats
from xbd.core.datapath.engine import MAX_PIECES, MAX_SEGMENTS, IoEngine
from xbd.core.datapath.extents import ExtentCache, Piece
from xbd.core.datapath.journal import Journal, OpenRequest
from xbd.core.datapath.pages import GuestPages, Work
from xbd.core.driver import DeviceAccess, Extent
from xbd.core.driver.places import Places
from xbd.core.errors import BadRequest, Disposition, GrantFailed, XbdError
from xbd.core.hypervisor import EventChannel
from xbd.core.ratelimit import RateLimit

_log = structlog.get_logger()

TURN_SEGMENTS = 2048
"""What one ring sets off before the others have their turn: 8 MiB if all segments are pages."""
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
    _open: dict[int, Request | Work] = attrs.field(factory=dict, init=False)
    """Requests that were set off and have no answer yet, by journal slot."""
    _places: Places[Work] = attrs.field(init=False)
    _ended: list[Work] = attrs.field(factory=list, init=False)
    """Upcalls that are about to be answered together."""
    _backlog: deque[Item] = attrs.field(factory=deque, init=False)
    """Requests that wait: for memory, or behind a barrier."""
    _barrier: bool = attrs.field(default=False, init=False)
    """Whether a barrier is under way."""
    _advancing: bool = attrs.field(default=False, init=False)
    _again: bool = attrs.field(default=False, init=False)
    _turn: int = attrs.field(default=TURN_SEGMENTS, init=False)
    """What is left of it, in segments."""
    _resting: bool = attrs.field(default=False, init=False)
    """Whether the others have their turn just now."""
    _gone: bool = attrs.field(default=False, init=False)
    """Whether the connection has ended."""
    _quiet: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)
    """Where those sleep who wait for answers to leave."""
    _cached: CachedReads = attrs.field(init=False)
    _alignment: int = attrs.field(init=False)
    _memory_alignment: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._places = Places(self.access, self._placed)
        geometry = self.access.geometry
        self._cached = CachedReads(self.extents.reading, self.pages, self.stats)
        self._alignment = geometry.request_alignment
        self._memory_alignment = geometry.memory_alignment

    # -- wake-ups ---------------------------------------------------------------------------

    def owe(self, requests: Sequence[OpenRequest]) -> None:
        """Requests of an earlier backend, in the journal's first slots; before `run`."""
        entries = b"".join(request.entry for request in requests)
        self._backlog.extend(enumerate(self.decoder.decode_batch(entries)))

    async def run(self) -> None:
        """Serve.  Raises `RingCorrupt`."""
        idle = 0
        if self._backlog:
            self._advance()
        self.channel.notify()  # events may have been lost before we were here
        while True:
            idle = 0 if self.serve() else idle + 1
            again = self.ring.final_check()
            if idle > SPURIOUS_EVENTS:
                await trio.sleep(min(0.001 * (idle - SPURIOUS_EVENTS), MAX_BACK_OFF_SECONDS))
            elif again:
                await trio.lowlevel.checkpoint()
            if again:
                continue
            self.channel.unmask()
            await trio.lowlevel.wait_readable(self.channel.fd)
            self.channel.take()

    def serve(self) -> bool:
        """One batch; False if there was none.  Raises `RingCorrupt`."""
        entries = self.ring.take()
        if not entries:
            return False
        requests = self.decoder.decode_batch(entries)
        slots = self.journal.record((self.ring.req_cons - len(requests)) & 0xFFFFFFFF, entries)
        items = zip(slots, requests, strict=True)
        self.pages.batch += 1
        if self._cached.useful and not self._backlog and not self._barrier:
            answers = self._cached.serve(items, self._backlog)
            if answers:
                self._publish(answers, slots if len(answers) == len(slots) else None)
        else:
            self._backlog.extend(items)
        if self._backlog:
            self._advance()
        return True

    @property
    def in_flight(self) -> int:
        """Requests consumed and not answered."""
        return len(self._open) + len(self._backlog)

    async def drained(self) -> None:
        """Wait until every consumed request is answered, or the connection has ended."""
        while self.in_flight and not self._gone:
            await self._quiet.park()

    def transfers(self, offset: int, length: int) -> set[Work]:
        """Transfers through extents, in flight, that touch a range."""
        end = offset + length
        if self._gone:
            return set()
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
        """Set off waiting requests, as far as they can go now.

        What ends at once comes back here.  It is only noted then, and the loop goes on: a guest
        decides how many such rounds there are, and the stack must not grow with them.
        """
        self._again = True
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._again and self._backlog and not self._resting and not self.engine.closing:
                self._again = False
                self._set_off()
        finally:
            self._advancing = False

    def _set_off(self) -> None:
        backlog = self._backlog
        if backlog and self._open and self._is_barrier(backlog[0][1]):
            return
        failed: list[tuple[int, Rejected]] = []
        works: list[Work] = []
        while backlog and not self._barrier:
            if self._turn <= 0:
                self._resting = True
                self.nursery.start_soon(self._next_turn)
                break
            slot, waiting = backlog.popleft()
            request = whole(waiting)
            if type(request) is Indirect:
                request = self._expand(request)
            if self._is_barrier(request) and not self._take_barrier(works):
                backlog.appendleft((slot, request))
                break
            if isinstance(request, Transfer):
                self._turn -= len(request.segments)
                try:
                    work = self.pages.attach(slot, request)
                except GrantFailed as error:
                    request = _rejected(request, str(error))
                else:
                    if work is None:
                        self._barrier = False
                        backlog.appendleft((slot, request))
                        break
                    self._open[slot] = work
                    works.append(work)
            elif isinstance(request, Flush | Discard):
                self._open[slot] = request
                self.nursery.start_soon(self._control, slot, request)
            if isinstance(request, Rejected):
                self._barrier = False
                failed.append((slot, request))
        self._start(works)
        if failed:
            self._refuse(failed)

    async def _next_turn(self) -> None:
        await trio.lowlevel.checkpoint()
        self._turn = TURN_SEGMENTS
        self._resting = False
        self._advance()

    def _is_barrier(self, request: Single | Request | Rejected) -> bool:
        return (type(request) is Flush and request.operation == constants.WRITE_BARRIER) or (
            type(request) is Transfer and request.barrier
        )

    def _take_barrier(self, works: Sequence[Work]) -> bool:
        """Begin a barrier if nothing is in flight before it."""
        if self._open or works or self._barrier:
            return False
        self._barrier = True
        return True

    def _start(self, works: list[Work]) -> None:
        """Set off transfers that have their pages."""
        if not works:
            return
        self.pages.fetch(works)
        queued = False
        failed = []
        for work in works:
            if work.status != _OKAY:
                failed.append(work)
                continue
            request = work.request
            if request.barrier or request.flush or not self._fits(work):
                self.nursery.start_soon(self._upcall, work)
            elif self._send(work):
                queued = True
            elif not (request.write and self._seek_place(work)):
                self.nursery.start_soon(self._upcall, work)
        if failed:
            self._answer(failed)
        if queued:
            self.engine.kick()

    def _send(self, work: Work) -> bool:
        """Have the engine move a transfer, if all of it is known; `kick` it afterwards."""
        fd, position, pieces = self._find(work.request)
        if fd >= 0:
            self.engine.start(self, work, fd, position)
        elif pieces:
            self.engine.start_split(self, work, pieces)
        else:
            return False
        work.direct = True
        return True

    def _find(self, request: Transfer) -> tuple[int, int, Sequence[Piece]]:
        """Where all of a transfer lies: the file and the place in it; or -1, and the pieces that
        it lies in, none if the driver has to move it."""
        extents = self.extents.writing if request.write else self.extents.reading
        offset, length = request.offset, request.length
        start, end, fd, delta = extents.hot
        if start <= offset and offset + length <= end:
            return fd, offset + delta, ()
        words, fd, shift, in_chunk, _ = extents.hot_map.view
        chunk = offset >> shift
        if chunk < len(words) and (offset & in_chunk) + length <= in_chunk + 1:
            word = words[chunk]
            if word:
                return fd, offset + word - KNOWN, ()
        pieces = extents.find(offset, length)
        if pieces is None or len(pieces) > MAX_PIECES:
            return -1, 0, ()
        fd, position, _ = pieces[0]
        self._cached.learn(fd)
        return (fd, position, ()) if len(pieces) == 1 else (-1, 0, pieces)

    def _fits(self, work: Work) -> bool:
        """Whether the engine and the host take the transfer as it is."""
        if (
            len(work.parts) > MAX_SEGMENTS
            or (work.request.offset | work.request.length) % self._alignment
        ):
            return False
        if self._memory_alignment <= constants.SECTOR:
            return True
        return not any((at | size) % self._memory_alignment for _, _, size, at in work.parts)

    def _expand(self, request: Indirect) -> Transfer | Rejected:
        try:
            return self.decoder.expand(request, self.pages.read_indirect(request))
        except (BadRequest, GrantFailed) as error:
            return _rejected(request, str(error))

    # -- upcalls ----------------------------------------------------------------------------

    def _seek_place(self, work: Work) -> bool:
        request = work.request
        return self._places.seek(self.nursery, work, request.offset, request.length)

    def _placed(self, works: Sequence[Work]) -> None:
        """The driver has found places for these writes, or not."""
        if self.engine.closing:
            return
        for work in works:
            if not self._send(work):
                self.nursery.start_soon(self._upcall, work)
        self.engine.kick()

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
        self._ended.append(work)
        if fatal is None:
            if len(self._ended) > 1:
                return  # who came first answers for all
            if len(self._open) > 1:
                # Drivers end many at a time: in this turn of the event loop the others get there.
                await trio.lowlevel.cancel_shielded_checkpoint()
        ended, self._ended = self._ended, []
        if ended:
            self._answer(ended)
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
        del self._open[slot]
        self._barrier = self._barrier and not self._is_barrier(request)
        self.stats.errors += bool(status)
        self._publish([(slot, request.id, request.operation, status)])
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
            self._answer(good)
        elif self._quiet:
            self._quiet.unpark_all()

    def _answer(self, works: Sequence[Work]) -> None:
        """Deliver and answer transfers that have ended."""
        self.pages.finish(works)
        stats = self.stats
        is_open = self._open
        answers = []
        for work in works:
            request = work.request
            if request.write:
                stats.wr_req += 1
                stats.wr_bytes += request.length
                if request.barrier:
                    self._barrier = False
            else:
                stats.rd_req += 1
                stats.rd_bytes += request.length
            del is_open[work.slot]
            answers.append((work.slot, request.id, request.operation, work.status))
            if work.status:
                stats.errors += 1
        self._publish(answers)

    def _publish(self, answers: Sequence[Answer], slots: Sequence[int] | None = None) -> None:
        """Answer, each slot's request once, then go on with what waited for it.

        `slots`: those of the answers, in order, where the caller has them at hand.
        """
        ring = self.ring
        slots = slots or [answer[0] for answer in answers]
        self.journal.answering(slots, ring.rsp_prod_pvt)
        ring.answer_many(answers)
        if ring.push():
            self.channel.notify()
        self.journal.clear(slots)
        if self._backlog:
            self._advance()
        if self._quiet:
            self._quiet.unpark_all()

    def _refuse(self, failed: Sequence[tuple[int, Rejected]]) -> None:
        for _, request in failed:
            self._log(request.reason)
        self.stats.errors += len(failed)
        self._publish(
            [(slot, request.id, request.operation, request.status) for slot, request in failed]
        )

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
        for work in works:
            work.status = _ERROR  # nobody knows what was read: deliver nothing
        self.pages.finish(works)
        self.pages.close()
        self._open.clear()
        self._backlog.clear()

    def forsake(self) -> None:
        """Nobody needs to wait for this ring any more."""
        self._gone = True
        self._quiet.unpark_all()


def _rejected(request: Transfer | Indirect, reason: str) -> Rejected:
    return Rejected(request.id, request.operation, _ERROR, reason)
