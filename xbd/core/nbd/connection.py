"""The transmission phase of one client.

Everything that has arrived is taken apart in one go.  Reads that the page cache has are answered
at once; transfers on resolved extents go to the engine, one submission for all of them; the rest
are upcalls to the driver.  Answers leave in any order, those that are ready together with one
system call.

Order.  Requests have none, but for FLUSH, which makes durable what was answered before it came.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

import attrs
import trio

from xbd.core.errors import DriverError
from xbd.core.nbd import constants as nbd
from xbd.core.nbd import replies
from xbd.core.nbd.buffers import BufferPool
from xbd.core.nbd.checks import Checks
from xbd.core.nbd.commands import Commands, Request
from xbd.core.nbd.direct import NOWAIT, DirectIo
from xbd.core.nbd.engine import Transfer
from xbd.core.nbd.errors import BadClient
from xbd.core.nbd.export import Export
from xbd.core.nbd.extents import Entry
from xbd.core.nbd.inbox import Inbox
from xbd.core.nbd.limits import REPLY_BYTES, Share
from xbd.core.nbd.negotiation import Agreed
from xbd.core.nbd.outbox import Outbox
from xbd.core.nbd.poller import READ, WRITE, Poller
from xbd.core.nbd.upcalls import Upcalls
from xbd.core.units import KIB, MIB

_log = logging.getLogger(__name__)

_INLINE_BYTES: Final = 128 * KIB
"""Longer reads would keep the others waiting."""
_TURN_BYTES: Final = 8 * MIB
"""So do many of them."""


@attrs.define(eq=False, kw_only=True)
class Connection:
    """One client.  All of it runs in trio's thread: called by the poller and by the engine, and
    in tasks."""

    sock: socket.socket
    export: Export
    agreed: Agreed
    poller: Poller
    direct: DirectIo
    pool: BufferPool
    share: Share
    failed: Callable[[DriverError], None]
    """Told of an error after which the disk can't be used."""
    note: Callable[[str], None]
    """For the log; not all that clients cause gets there."""
    received: bytes
    """What the client has sent already."""
    _checks: Checks = attrs.field(init=False)
    _outbox: Outbox = attrs.field(init=False)
    _upcalls: Upcalls = attrs.field(init=False)
    _nursery: trio.Nursery = attrs.field(init=False)
    _over: trio.Event = attrs.field(factory=trio.Event, init=False)
    """No more requests are taken."""
    _waiting: bool = attrs.field(default=False, init=False)
    """Whether requests wait for others to be answered."""
    _lacked: int = attrs.field(default=0, init=False)
    """When there was no room: `Budget.given` of that moment."""
    _inbox: Inbox = attrs.field(init=False)
    _arriving: Transfer | None = attrs.field(default=None, init=False)
    """A write whose data is still arriving."""
    _turn: int = attrs.field(default=_TURN_BYTES, init=False)
    _taking: bool = attrs.field(default=False, init=False)
    """Whether replies are sent soon anyway."""

    def __attrs_post_init__(self) -> None:
        access, structured = self.export.access, self.agreed.structured
        self._checks = Checks(self.export, self.agreed)
        self._inbox = Inbox(self.received)
        self._outbox = Outbox(self.sock, self.share, self.pool, structured=structured)
        self._upcalls = Upcalls(
            access=access,
            commands=Commands(access, self.direct, structured),
            direct=self.direct,
            poller=self.poller,
            outbox=self._outbox,
            budget=self.share.budget,
            flush=self._flush,
            failed=self.failed,
            note=self.note,
        )

    # -- life -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the client leaves, breaks the protocol, or is told to go by `stop`.

        Every request that arrived whole is carried out.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = self._upcalls.nursery = nursery
                self._watch()
                self._guarded(self._go_on)
                await self._over.wait()
                await self._settle()
                nursery.cancel_scope.cancel()
        finally:
            self._over.set()
            self._forget_arriving()
            self._upcalls.abandon()
            self._outbox.drop()
            self._watch()

    def stop(self) -> None:
        """Take no more requests, and end when those that were taken are answered."""
        self._over.set()
        self._watch()

    async def _settle(self) -> None:
        self._forget_arriving()
        room = self.share.budget.room
        with trio.move_on_after(self.share.budget.limits.farewell_seconds):
            while self.share.requests:
                await room.park()
        self._outbox.drop()
        while self.share.requests:  # what was begun has to end
            await room.park()

    def _forget_arriving(self) -> None:
        """A write that never arrived whole."""
        if self._arriving is not None:
            transfer, self._arriving = self._arriving, None
            self.pool.give(transfer.buffer)
            self.share.give(1, transfer.length)

    def _ready(self, events: int) -> None:
        """From the poller."""
        if events & WRITE:
            self._flush()
        if events & READ and not self._over.is_set():
            self._guarded(self._receive)

    def _watch(self) -> None:
        """Have the poller watch for what can be done now."""
        taking = not (self._over.is_set() or self._waiting)
        events = (READ if taking else 0) | (WRITE if self._outbox.full else 0)
        self.poller.watch(self.sock.fileno(), events, self._ready)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Whatever goes wrong is the end of this client, and of nothing else."""
        try:
            step()
            return
        except _Disconnect:
            pass
        except BadClient as error:
            self.note(f"client cut off: {error}")
        except DriverError as error:
            self.failed(error)
        except Exception:
            _log.exception("%s: a client was lost to a bug", self.export.access.device_id)
        self.stop()

    # -- requests in ------------------------------------------------------------------------

    def _receive(self) -> None:
        if self._inbox.receive(self.sock):
            self._go_on()
        else:
            self.stop()

    def _go_on(self) -> None:
        """Take what has arrived; if some of it has to wait, go on with it in a task."""
        if not self._take():
            self._waiting = True
            self._watch()
            self.poller.tasks += 1
            self._nursery.start_soon(self._wait_for_room)

    async def _wait_for_room(self) -> None:
        budget = self.share.budget
        try:
            if budget.given == self._lacked:
                await budget.room.park()
            else:  # there is some already
                await trio.lowlevel.checkpoint()
        finally:
            self.poller.tasks -= 1
        self._waiting = False
        self._watch()
        if not self._over.is_set():
            self._guarded(self._go_on)

    def _take(self) -> bool:
        """Set off all that has arrived; False if some of it must wait for room.

        Raises `_Disconnect`, `BadClient`, or what closes the disk.
        """
        self._taking = True
        self._turn = _TURN_BYTES
        try:
            return self._take_all()
        finally:
            self._taking = False
            self._upcalls.begin()
            self.direct.kick()
            self._flush()

    def _take_all(self) -> bool:
        inbox, share, checks, pool = self._inbox, self.share, self._checks, self.pool
        if self._arriving is not None:
            if not inbox.complete:
                return True
            transfer, self._arriving = self._arriving, None
            self._write(transfer)
        while (request := inbox.peek()) is not None:
            flags, kind, cookie, offset, length = request
            if kind == nbd.CMD_DISC:
                raise _Disconnect
            problem = checks.problem(kind, flags, offset, length)
            charge = length if kind <= nbd.CMD_WRITE and problem is None else REPLY_BYTES
            if not share.take(charge):
                self._lacked = share.budget.given
                return False
            inbox.advance()
            if problem is not None:
                if kind == nbd.CMD_WRITE:
                    inbox.skip(length)
                self._outbox.refuse(cookie, REPLY_BYTES, *problem)
            elif kind == nbd.CMD_READ and length:
                buffer = pool.take(length)
                data = buffer.view[:length]
                self._read(Transfer(self, False, offset, length, buffer, data, cookie, flags))
            elif kind == nbd.CMD_WRITE and length:
                buffer = pool.take(length)
                data = buffer.view[:length]
                transfer = Transfer(self, True, offset, length, buffer, data, cookie, flags)
                if not inbox.fetch(data):
                    self._arriving = transfer
                    break
                self._write(transfer)
            elif length or kind == nbd.CMD_FLUSH:
                self._upcalls.start(Request(kind, flags, cookie, offset, length), charge, None)
            else:
                self._outbox.put((self._nothing(kind, cookie),), charge)
        inbox.compact()
        return True

    def _read(self, transfer: Transfer) -> None:
        """At once if the page cache has it, by the engine if an extent does."""
        entry = self.direct.find(transfer.offset, transfer.length, for_write=False)
        if entry is None:
            self._upcalls.transfer(transfer)
        elif self._read_cached(transfer, entry):
            self._outbox.moved(transfer)
        else:
            self.direct.start(transfer, entry)

    def _read_cached(self, transfer: Transfer, entry: Entry) -> bool:
        fd, length = entry[2], transfer.length
        if length > _INLINE_BYTES or self._turn < 0 or not self.direct.is_cached(fd):
            return False
        self._turn -= length
        try:
            return os.preadv(fd, [transfer.data], transfer.offset + entry[3], NOWAIT) == length
        except BlockingIOError:
            return False  # not in the page cache
        except OSError:
            self.direct.never_cached(fd)
            return False

    def _write(self, transfer: Transfer) -> None:
        """By the engine if an extent has the place, and it need not be durable at once."""
        entry = None
        if not transfer.flags & nbd.CMD_FLAG_FUA:
            entry = self.direct.find(transfer.offset, transfer.length, for_write=True)
        if entry is None:
            self._upcalls.transfer(transfer)
        else:
            self.direct.start(transfer, entry)

    # -- answers out ------------------------------------------------------------------------

    def completed(self, good: Sequence[Transfer], bad: Sequence[Transfer]) -> None:
        """From the engine.  What it could not move whole, the driver's methods try again."""
        self.direct.ended(good)
        self.direct.ended(bad)
        for transfer in good:
            self._outbox.moved(transfer)
        if self._outbox.gone:
            self._outbox.give_up(bad)
        else:
            for transfer in bad:
                self._upcalls.alone(transfer)
        if not self._taking:
            self._flush()

    def _flush(self) -> None:
        was_full = self._outbox.full
        self._outbox.flush()
        if self._outbox.gone:
            if not self._over.is_set():
                self.stop()
        elif self._outbox.full != was_full:
            self._watch()

    def _nothing(self, kind: int, cookie: int) -> bytes:
        """The reply to a request for nothing."""
        if kind == nbd.CMD_READ and self.agreed.structured:
            return replies.nothing(cookie)
        return replies.done(cookie)


class _Disconnect(Exception):
    """The client said that it goes."""
