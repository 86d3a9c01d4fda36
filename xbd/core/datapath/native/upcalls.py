"""What the I/O threads leave to Python: asking drivers where bytes lie, and their async methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import attrs
import structlog
import trio

from xbd.core.blkif import Decoder, constants
from xbd.core.datapath.config import DiskStats
from xbd.core.datapath.native import ffi, lib
from xbd.core.datapath.native.extents import NativeExtents
from xbd.core.driver import DeviceAccess, Extent, ReadRequest, WriteRequest
from xbd.core.driver.places import Places
from xbd.core.driver.together import by_size
from xbd.core.errors import (
    DeviceBroken,
    Disposition,
    GuestError,
    RingCorrupt,
    XbdError,
)
from xbd.core.ratelimit import RateLimit

_log = structlog.get_logger()

_OKAY: Final = constants.RSP_OKAY


@attrs.frozen
class _Asked:
    """A request that the driver's methods carry out."""

    request: int
    operation: int
    offset: int
    length: int
    buffers: Any
    nr_buffers: int
    read_only: bool


@attrs.define(eq=False)
class Upcalls:
    """Of one connection.  All of it runs in tasks of one nursery."""

    name: str
    handle: Any
    access: DeviceAccess
    extents: NativeExtents
    decoder: Decoder
    entries: int
    """Of each ring."""
    stats: DiskStats
    events: Any
    """An array for them, until something is waited for: other connections use it, too."""
    log_limit: RateLimit = attrs.field(factory=RateLimit)
    nursery: trio.Nursery = attrs.field(init=False)
    """Where the driver's methods run; set before `run`."""
    stopped: bool = attrs.field(default=False, init=False)
    _stopping: bool = attrs.field(default=False, init=False)
    _waiting: dict[int, trio.Event] = attrs.field(factory=dict, init=False)
    """By ticket: for `drain` and `settle`."""
    _tickets: int = attrs.field(default=0, init=False)
    _ended: list[tuple[int, int]] = attrs.field(factory=list, init=False)
    """Requests that are about to be answered together, and their status."""
    _places: Places[_Asked] = attrs.field(init=False)
    _together: list[list[_Asked]] = attrs.field(factory=lambda: [[], []], init=False)
    """Reads and writes that the driver will be asked for together."""
    _under_way: int = attrs.field(default=0, init=False)
    _wake_fd: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._places = Places(self.access, self._placed)
        self._wake_fd = lib.xbd_connection_wake_fd(self.handle)

    # -- events -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve.  Raises `RingCorrupt`, or what closes the device."""
        try:
            while True:
                await self._woken()
                while (count := self._fetch()) == len(self.events):
                    self._handle(count)
                    await trio.lowlevel.checkpoint()
                self._handle(count)
        finally:
            # The driver's methods may take a while to end; nothing new is begun meanwhile.
            lib.xbd_connection_hold(self.handle)

    def stop(self) -> None:
        """After `run`: tell the threads to let go of the connection."""
        self._stopping = True
        lib.xbd_connection_stop(self.handle)

    async def finish(self) -> None:
        """After `stop`: return when the threads have let go."""
        while not self.stopped:
            await self._woken()
            while count := self._fetch():
                for event in self.events[0:count]:
                    self._note_end(event)

    async def _woken(self) -> None:
        await trio.lowlevel.wait_readable(self._wake_fd)
        with suppress(BlockingIOError):
            os.read(self._wake_fd, 8)

    def _fetch(self) -> int:
        count: int = lib.xbd_connection_events(self.handle, self.events, len(self.events))
        return count

    def _handle(self, count: int) -> None:
        found: list[int] = []
        try:
            for event in self.events[0:count]:
                if event.kind == lib.XBD_REQUEST:
                    self._request(event, found)
                elif event.kind == lib.XBD_REJECTED:
                    self._rejected(event)
                elif event.kind == lib.XBD_NO_PAGES:
                    self._log(f"the guest's pages can't be reached: {_why(event.number)}")
                elif event.kind == lib.XBD_CORRUPT:
                    raise self._corrupt(event.number)
                elif event.kind == lib.XBD_BROKEN:
                    raise DeviceBroken(f"the I/O threads can't go on: {os.strerror(event.number)}")
                else:
                    self._note_end(event)
        finally:
            if found:
                self._answer([(request, lib.XBD_TRY_AGAIN, _OKAY) for request in found])
            self._begin_together()

    def _corrupt(self, claimed: int) -> RingCorrupt:
        if claimed > self.entries:
            return RingCorrupt(
                f"the frontend claims {claimed} requests in a ring of {self.entries}"
            )
        return RingCorrupt("the frontend took back requests that were consumed already")

    def _note_end(self, event: Any) -> None:
        if event.kind in (lib.XBD_DRAINED, lib.XBD_SETTLED):
            if event.number in self._waiting:
                self._waiting.pop(event.number).set()
        elif event.kind == lib.XBD_STOPPED:
            self.stopped = True

    def _request(self, event: Any, found: list[int]) -> None:
        write = event.operation != constants.READ
        resolvable = event.resolvable
        if resolvable and self._learn(event.offset, event.length, write=write):
            found.append(event.request)
            return
        asked = _Asked(
            event.request,
            event.operation,
            event.offset,
            event.length,
            event.buffers,
            event.nr_buffers,
            event.read_only,
        )
        seeks = resolvable and write
        if not (seeks and self._places.seek(self.nursery, asked, asked.offset, asked.length)):
            self._begin(asked, resolvable=resolvable)

    def _learn(self, offset: int, length: int, *, write: bool) -> bool:
        """Whether the threads can do it after all."""
        if self.extents.learn(offset, length, for_write=write):
            return True
        return write and self.extents.can_claim(offset, length)

    def _begin(self, asked: _Asked, *, resolvable: bool) -> None:
        """`resolvable`: a transfer that fits the driver's alignment."""
        if resolvable and self.access.takes_with_others(
            asked.offset, asked.length, read_only=asked.read_only
        ):
            self._together[asked.operation != constants.READ].append(asked)
            return
        self._under_way += 1
        self.nursery.start_soon(self._carry_out, asked)

    def _begin_together(self) -> None:
        """Have the driver carry out what has come together."""
        for write, asked in enumerate(self._together):
            if asked:
                self._together[write] = []
                self._under_way += len(asked)
                for some in by_size(asked):
                    self.nursery.start_soon(self._carry_out_many, some, bool(write))

    def _placed(self, asked: Sequence[_Asked]) -> None:
        """The driver has found places for these writes, or not."""
        found = []
        for one in asked:
            if self._learn(one.offset, one.length, write=True):
                found.append((one.request, lib.XBD_TRY_AGAIN, _OKAY))
            else:
                self._begin(one, resolvable=True)
        if found:
            self._answer(found)
        self._begin_together()

    # -- the driver's methods ---------------------------------------------------------------

    async def _carry_out(self, asked: _Asked) -> None:
        """Raises what closes the device."""
        status = _OKAY
        fatal = None
        views = _views(asked)
        try:
            await self._call(asked, views)
        except XbdError as error:
            status, fatal = self._judge(error)
        finally:
            self._under_way -= 1
            for view in views:
                view.release()
        self._ended.append((asked.request, status))
        if fatal is None:
            if len(self._ended) > 1:
                return  # who came first answers for all
            if self._under_way:
                # Drivers end many at a time: in this turn of the event loop the others get there.
                await trio.lowlevel.cancel_shielded_checkpoint()
        ended, self._ended = self._ended, []
        if ended:
            self._answer([(request, lib.XBD_ANSWER, status) for request, status in ended])
        if fatal is not None:
            raise fatal

    async def _carry_out_many(self, asked: Sequence[_Asked], write: bool) -> None:
        """Transfers through the driver's methods for many.  Raises what closes the device."""
        reads = [] if write else [ReadRequest(one.offset, _views(one)) for one in asked]
        if len(reads) == 1:
            reads[0].alone = lib.xbd_connection_in_flight(self.handle) == 1
        writes = [WriteRequest(one.offset, _views(one)) for one in asked] if write else []
        requests: Sequence[ReadRequest | WriteRequest] = writes or reads
        failure: XbdError | None = None
        try:
            if write:
                await self.access.write_many(writes)
            else:
                await self.access.read_many(reads)
        except XbdError as error:
            failure = error
        finally:
            self._under_way -= len(asked)
            for request in requests:
                for view in request.buffers:
                    view.release()
        fatal = None
        verdicts = []
        for one, request in zip(asked, requests, strict=True):
            status, wrong = _OKAY, request.error or failure
            if wrong is not None:
                status, raised = self._judge(wrong)
                fatal = fatal or raised
            verdicts.append((one.request, lib.XBD_ANSWER, status))
        self._answer(verdicts)
        if fatal is not None:
            raise fatal

    async def _call(self, asked: _Asked, views: Sequence[memoryview]) -> None:
        operation = asked.operation
        access = self.access
        if operation == constants.DISCARD:
            await access.discard([Extent(offset=asked.offset, length=asked.length)])
            return
        if operation in (constants.FLUSH_DISKCACHE, constants.WRITE_BARRIER):
            await access.flush()
        if operation == constants.READ:
            await access.readv(asked.offset, views)
        elif views:
            await access.writev(asked.offset, views)
        if operation == constants.WRITE_BARRIER and views:
            await access.flush()

    def _judge(self, error: XbdError) -> tuple[int, XbdError | None]:
        """What the guest is told, and the error again if it means more than an answer."""
        self._log(str(error))
        if error.disposition is Disposition.ANSWER_UNSUPPORTED:
            return constants.RSP_EOPNOTSUPP, None
        if error.disposition is Disposition.ANSWER_ERROR:
            return constants.RSP_ERROR, None
        return constants.RSP_ERROR, error

    def _answer(self, verdicts: Sequence[tuple[int, int, int]]) -> None:
        lib.xbd_connection_answer(
            self.handle, ffi.new("struct xbd_answer[]", verdicts), len(verdicts)
        )

    # -- what was answered already ----------------------------------------------------------

    def _rejected(self, event: Any) -> None:
        self.log_limit.suppressed += event.number
        entry = bytes(ffi.buffer(event.entry))[: self.decoder.abi.request_size]
        try:
            self.decoder.decode(entry)
        except GuestError as error:
            self._log(str(error))
        else:
            self._log("an indirect request with wrong segments")

    def _log(self, reason: str) -> None:
        self.stats.last_error = reason
        held = self.log_limit.allows()
        if held is not None:
            _log.warning("request failed", device=self.name, reason=reason, suppressed=held)

    # -- waiting ----------------------------------------------------------------------------

    async def settle(self, offset: int, length: int) -> None:
        """Wait until no transfer through an extent that is in flight now touches the range."""
        ticket, settled = self._ticket()
        if not self._stopping:  # else all of it ends before anybody is told
            length = min(length, (1 << 64) - 1)
            lib.xbd_connection_settle(self.handle, offset, length, ticket)
        await settled.wait()

    async def drain(self) -> None:
        """Have no more requests taken, and wait until all that were taken are answered."""
        ticket, drained = self._ticket()
        if not self._stopping:
            lib.xbd_connection_drain(self.handle, ticket)
        await drained.wait()

    def _ticket(self) -> tuple[int, trio.Event]:
        self._tickets += 1
        event = self._waiting[self._tickets] = trio.Event()
        return self._tickets, event

    def release_waiting(self) -> None:
        """The connection has ended: nothing is in flight any more."""
        for event in self._waiting.values():
            event.set()
        self._waiting.clear()


def _views(asked: _Asked) -> list[memoryview]:
    """Its buffers.  To be released: whoever kept one must not reach the guest's memory later."""
    views = [
        memoryview(ffi.buffer(buffer.start, buffer.length)).cast("B")
        for buffer in (asked.buffers[0 : asked.nr_buffers] if asked.nr_buffers else ())
    ]
    return [view.toreadonly() for view in views] if asked.read_only else views


def _why(number: int) -> str:
    """An errno, or a GNTST error, which is negative."""
    signed = number - (1 << 64) if number >> 63 else number
    return os.strerror(signed) if signed > 0 else f"grant status {signed}"
