"""A device's connection to its frontend, with its failures kept apart from the device's own."""

from __future__ import annotations

import trio

from xbd.core.backend.bell import Bell
from xbd.core.backend.failure import worst
from xbd.core.datapath.config import FrontendConfig
from xbd.core.datapath.disk import Disk
from xbd.core.driver import Capability


class Link:
    """At most one connection at a time, run in a nursery of its own inside `nursery`.

    What goes wrong while it serves ends the connection, is kept in `failure`, and rings the bell.
    """

    def __init__(self, disk: Disk, nursery: trio.Nursery, bell: Bell) -> None:
        self._disk = disk
        self._nursery = nursery
        self._bell = bell
        self._scope: trio.CancelScope | None = None
        self._ended = trio.Event()
        self.frontend: FrontendConfig | None = None
        """What the connection was made from; None while there is none."""
        self.failure: BaseException | None = None

    @property
    def connected(self) -> bool:
        return self.frontend is not None

    async def connect(self, frontend: FrontendConfig) -> None:
        """Map, bind, serve.  Raises what prevented it."""
        assert not self.connected, "connected already"
        ready = trio.Event()
        self._ended = trio.Event()
        self.failure = None
        self.frontend = frontend
        self._nursery.start_soon(self._run, frontend, ready)
        await ready.wait()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def look_again(self, seconds: float) -> None:
        """Ring the bell in a while."""
        self._nursery.start_soon(self._ring_later, seconds)

    async def _ring_later(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self._bell.ring()

    async def _run(self, frontend: FrontendConfig, ready: trio.Event) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                await self._disk.connect(nursery, frontend)
                ready.set()
        except Exception as error:
            self.failure = worst(error)
        finally:
            with trio.CancelScope(shield=True):
                await self._disk.disconnect(drain=False)
            self._scope = None
            self.frontend = None
            self._ended.set()
            ready.set()
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
        if self._scope is not None:
            self._scope.cancel()
        if self.connected:
            with trio.CancelScope(shield=True):
                await self._ended.wait()
