"""What one client's requests need the driver for.

What no extent has is for the driver's methods: transfers that came together in one call, if it
takes many at a time, and everything else in tasks of their own.  A write to what lies nowhere yet
may be the engine's after all: with all others that come meanwhile it waits for the driver to find
places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs
import trio

from xbd.core.driver import DeviceAccess, ReadRequest, WriteRequest
from xbd.core.driver.places import Places
from xbd.core.driver.together import by_size
from xbd.core.errors import Disposition, DriverError
from xbd.core.nbd import constants as nbd
from xbd.core.nbd import replies
from xbd.core.nbd.buffers import Buffer
from xbd.core.nbd.commands import Commands, Request
from xbd.core.nbd.direct import DirectIo
from xbd.core.nbd.engine import Transfer
from xbd.core.nbd.limits import Budget
from xbd.core.nbd.outbox import Outbox
from xbd.core.nbd.poller import Poller

PATIENCE_SECONDS: Final = 0.005
"""How long a call waits for the end of the one before it.  Small ones at the same time get in each
other's way, and more comes meanwhile; but storage that is slow shall not hold up the others."""
_NO_MEMORY: Final = memoryview(b"")


@attrs.define(eq=False)
class _Together:
    """What the driver will be asked for together."""

    transfers: list[Transfer] = attrs.field(factory=list)
    gathering: bool = False
    """Whether a task is about to take them."""
    under_way: int = 0
    """Calls that have not ended."""
    ended: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    def take(self) -> list[Transfer]:
        self.gathering = False
        transfers, self.transfers = self.transfers, []
        return transfers


@attrs.define(eq=False, kw_only=True)
class Upcalls:
    """Of one connection."""

    access: DeviceAccess
    commands: Commands
    direct: DirectIo
    poller: Poller
    outbox: Outbox
    budget: Budget
    flush: Callable[[], None]
    """Has the outbox send what it has."""
    failed: Callable[[DriverError], None]
    """Told of an error after which the disk can't be used."""
    note: Callable[[str], None]
    nursery: trio.Nursery = attrs.field(init=False)
    """For the tasks; set before anything is started."""
    _places: Places[Transfer] = attrs.field(init=False)
    _sought: set[Transfer] = attrs.field(factory=set, init=False)
    """Writes whose places are being sought."""
    _together: tuple[_Together, _Together] = attrs.field(
        factory=lambda: (_Together(), _Together()), init=False
    )
    """Reads, and writes."""

    def __attrs_post_init__(self) -> None:
        self._places = Places(self.access, self._placed)

    # -- beginnings -------------------------------------------------------------------------

    def transfer(self, transfer: Transfer) -> None:
        """Move what no extent has; `begin` afterwards."""
        write, offset, length = transfer.write, transfer.offset, transfer.length
        special = self.commands.is_special(transfer.flags, length, write=write)
        if special or not self.direct.fits(offset, length):
            self.alone(transfer)
        elif write and self._places.seek(self.nursery, transfer, offset, length):
            self.poller.tasks += 1
            self._sought.add(transfer)
        else:
            self._move(transfer)

    def _move(self, transfer: Transfer) -> None:
        """By the driver's methods."""
        if self.access.takes_with_others(transfer.offset, transfer.length):
            self._together[transfer.write].transfers.append(transfer)
        else:
            self.alone(transfer)

    def _placed(self, transfers: Sequence[Transfer]) -> None:
        """The driver has found places for these writes, or not."""
        self.poller.tasks -= len(transfers)
        self._sought.difference_update(transfers)
        for transfer in transfers:
            entry = self.direct.find(transfer.offset, transfer.length, for_write=True)
            if entry is None:
                self._move(transfer)
            else:
                self.direct.start(transfer, entry)
        self.begin()
        self.direct.kick()

    def alone(self, transfer: Transfer) -> None:
        """Move it by the driver's methods for single requests."""
        kind = nbd.CMD_WRITE if transfer.write else nbd.CMD_READ
        offset, length = transfer.offset, transfer.length
        request = Request(kind, transfer.flags, transfer.cookie, offset, length)
        self.start(request, length, transfer.buffer)

    def start(self, request: Request, charge: int, buffer: Buffer | None) -> None:
        """Carry out any request; `charge` is what it counts as."""
        self.poller.tasks += 1
        self.nursery.start_soon(self._carry_out, request, charge, buffer)

    def begin(self) -> None:
        """Have the driver move what has come together."""
        for together in self._together:
            if together.transfers and not together.gathering:
                together.gathering = True
                self.poller.tasks += 1
                self.nursery.start_soon(self._carry_out_together, together)

    # -- ends -------------------------------------------------------------------------------

    async def _carry_out(self, request: Request, charge: int, buffer: Buffer | None) -> None:
        """In a task of its own."""
        memory = _NO_MEMORY if buffer is None else buffer.view[: request.length]
        try:
            reply = await self.commands.carry_out(request, memory)
        except DriverError as error:
            self._refuse(error, request.cookie, charge, buffer)
        except BaseException:
            self.outbox.put((), charge, buffer)  # nobody hears of it, but it is over
            raise
        else:
            self.outbox.put(reply, charge, buffer)
        finally:
            self.poller.tasks -= 1
        self.flush()

    async def _carry_out_together(self, together: _Together) -> None:
        """What has come, in a moment: after the calls that are under way, unless they are slow."""
        try:
            if together.under_way:
                with trio.move_on_after(PATIENCE_SECONDS):
                    await together.ended.park()
            first, *others = by_size(together.take())
            for some in others:
                self.poller.tasks += 1
                self.nursery.start_soon(self._carry_out_next, together, some)
        except BaseException:
            self.poller.tasks -= 1
            raise
        await self._carry_out_next(together, first)

    async def _carry_out_next(self, together: _Together, transfers: Sequence[Transfer]) -> None:
        together.under_way += 1
        try:
            await self._carry_out_many(transfers)
        finally:
            together.under_way -= 1
            together.ended.unpark()

    async def _carry_out_many(self, transfers: Sequence[Transfer]) -> None:
        """All of them are reads, or all are writes."""
        failure: DriverError | None = None
        requests: Sequence[ReadRequest | WriteRequest] = ()
        try:
            if transfers[0].write:
                requests = writes = [WriteRequest(one.offset, [one.data]) for one in transfers]
                await self.access.write_many(writes)
            else:
                requests = reads = [ReadRequest(one.offset, [one.data]) for one in transfers]
                reads[0].alone = self.budget.bytes == transfers[0].length
                await self.access.read_many(reads)
        except DriverError as error:
            failure = error
        except BaseException:
            self.outbox.give_up(transfers)
            raise
        finally:
            self.poller.tasks -= 1
        for one, request in zip(transfers, requests, strict=True):
            wrong = request.error or failure
            if wrong is None:
                self.outbox.moved(one)
            else:
                self._refuse(wrong, one.cookie, one.length, one.buffer)
        self.flush()

    def _refuse(self, error: DriverError, cookie: int, charge: int, buffer: Buffer | None) -> None:
        self.note(f"request failed: {error}")
        self.outbox.refuse(cookie, charge, *replies.error_of(error), buffer)
        if error.disposition >= Disposition.CLOSE_DEVICE:
            self.failed(error)

    def abandon(self) -> None:
        """The nursery has ended, perhaps cancelled: nobody does anything any more."""
        for together in self._together:
            self.outbox.give_up(together.take())
        self.outbox.give_up(self._sought)
        self.poller.tasks -= len(self._sought)
        self._sought.clear()
