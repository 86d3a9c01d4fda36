"""A device's connection to its frontend, with its failures kept apart from the device's own."""

from __future__ import annotations

import trio

from xbd.core.backend.bell import Bell
from xbd.core.backend.failure import worst
from xbd.core.datapath.config import FrontendConfig
from xbd.core.datapath.disk import AnyConnection, Disk
from xbd.core.driver import Capability


class Link:
    """At most one connection at a time, run by a task in `nursery`.

    What goes wrong while it serves ends the connection, is kept in `failure`, and rings the bell.
    """

    def __init__(self, disk: Disk, nursery: trio.Nursery, bell: Bell) -> None:
        self._disk = disk
        self._nursery = nursery
        self._bell = bell
        self._ended = trio.Event()
        self.frontend: FrontendConfig | None = None
        """What the connection was made from; None while there is none."""
        self.failure: BaseException | None = None

    @property
    def connected(self) -> bool:
        return self.frontend is not None

    def connect(self, frontend: FrontendConfig) -> None:
        """Map, bind, serve.  Raises what prevented it."""
        assert not self.connected, "connected already"
        self.failure = None
        connection = self._disk.connect(frontend)
        self._ended = trio.Event()
        self.frontend = frontend
        self._nursery.start_soon(self._run, connection)

    def look_again(self, seconds: float) -> None:
        """Ring the bell in a while."""
        self._nursery.start_soon(self._ring_later, seconds)

    async def _ring_later(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self._bell.ring()

    async def _run(self, connection: AnyConnection) -> None:
        try:
            await self._disk.serve(connection)
        except Exception as error:
            self.failure = worst(error)
        finally:
            self.frontend = None
            self._ended.set()
            self._bell.ring()

    async def drain(self, seconds: float) -> bool:
        """Finish what was taken, make it durable, disconnect.  False: storage took too long."""
        if not self.connected:
            return True
        connection = self._disk.connection
        finished = False
        with trio.move_on_after(seconds, shield=True):
            if connection is not None:
                await connection.drain()
            if Capability.FLUSH in self._disk.access.capabilities and not self._disk.read_only:
                await self._disk.access.flush()
            finished = True
        await self.abandon()
        return finished

    async def abandon(self) -> None:
        """Disconnect at once; requests in flight get no answer."""
        if self.connected:
            with trio.CancelScope(shield=True):
                await self._disk.disconnect(drain=False)
                await self._ended.wait()
