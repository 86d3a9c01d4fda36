"""The bytes of one client of the embedded XenStore: in as requests, out as the outbox has them."""

from __future__ import annotations

from typing import Final

import trio

from xbd.core.xenstore.outbox import Outbox
from xbd.core.xenstore.protocol import PacketStream, WireError
from xbd.core.xenstore.session import Session

_READ_BYTES: Final = 16 << 10
_BURST: Final = 16
"""Requests of one client carried out in a row; then the others have a turn."""


class Connection:
    """Moves one client's bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.outbox = Outbox(self._wake)
        self._stream = stream
        self._work = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()

    async def run(self, session: Session) -> None:
        """Until the client goes, or is dropped: `WireError`."""
        failure: WireError | None = None
        with self._scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send)
                    try:
                        await self._receive(session)
                    except WireError as error:
                        failure = error
                    nursery.cancel_scope.cancel()
            finally:
                await trio.aclose_forcefully(self._stream)
        if self.outbox.overflown:
            failure = WireError("it does not read its events")
        if failure is not None:
            raise failure

    def _wake(self) -> None:
        self._work.unpark_all()
        if self.outbox.overflown:
            self._scope.cancel()

    async def _receive(self, session: Session) -> None:
        packets = PacketStream()
        while data := await self._read():
            for count, request in enumerate(packets.feed(data), 1):
                session.handle(request)
                while self.outbox.full:
                    await self._room.park()
                if count % _BURST == 0:
                    await trio.lowlevel.checkpoint()

    async def _read(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_READ_BYTES))
        except trio.BrokenResourceError:
            return b""

    async def _send(self) -> None:
        while True:
            while not self.outbox:
                await self._work.park()
            data = self.outbox.take()
            try:
                await self._stream.send_all(data)
            except trio.BrokenResourceError:
                self._scope.cancel()
            self.outbox.sent(len(data))
            self._room.unpark_all()
