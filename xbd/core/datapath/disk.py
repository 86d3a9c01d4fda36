"""An opened disk, ready for frontends to come and go."""

from __future__ import annotations

from pathlib import Path

import attrs

from xbd.core.blkif import Limits
from xbd.core.datapath.config import DiskStats, Features, FrontendConfig, GrantMode
from xbd.core.datapath.connection import Connection, Parts
from xbd.core.datapath.extents import ExtentCache
from xbd.core.datapath.native.connection import NativeConnection
from xbd.core.datapath.native.extents import NativeExtents
from xbd.core.datapath.native.threads import NativeThreads
from xbd.core.datapath.pages import DomainBudget
from xbd.core.driver import DeviceAccess
from xbd.core.hypervisor import Hypervisor

AnyConnection = Connection | NativeConnection


@attrs.frozen(eq=False)
class _Forgotten:
    """A range whose answers of `resolve` were taken back."""

    start: int
    end: int

    def touches(self, other: _Forgotten) -> bool:
        """Whether they have bytes in common."""
        return self.start < other.end and other.start < self.end

    def covers(self, other: _Forgotten) -> bool:
        """Whether all of the other one is in this one."""
        return self.start <= other.start and other.end <= self.end


class Disk:
    """Lives as long as the device is open; at most one connection at a time."""

    def __init__(
        self,
        access: DeviceAccess,
        *,
        name: str,
        devid: int,
        read_only: bool,
        features: Features,
        hypervisor: Hypervisor,
        grants: GrantMode = GrantMode.AUTO,
        journal_dir: Path | None = None,
        budget: DomainBudget | None = None,
        threads: NativeThreads | None = None,
    ) -> None:
        """`budget`: what all disks of the guest share; None: this one has its own.

        `threads`: what serves the rings; None: the data path in Python does.
        """
        self.access = access
        self.name = name
        self.devid = devid
        self.read_only = read_only
        self.features = features
        self._stats = DiskStats()
        self.connection: AnyConnection | None = None
        self._extents = (
            ExtentCache(access.resolve)
            if threads is None
            else NativeExtents(access.resolve, access.zeroes)
        )
        self._serving: list[AnyConnection] = []
        """Connections that may have I/O in flight, from before they begin until they have ended."""
        self._settling: list[_Forgotten] = []
        """Ranges that I/O may be in flight to though nothing of them is known; new ones last."""
        self._threads = threads
        self._hypervisor = hypervisor
        self._grants = grants
        self._journal_dir = journal_dir
        self._budget = budget or DomainBudget()
        self.paused = False
        """Whether requests stay in the rings; of connections to come, too."""
        access.subscribe(self.invalidate)
        if isinstance(self._extents, NativeExtents):
            access.claims = self._extents.claims

    @property
    def stats(self) -> DiskStats:
        """Counters since the disk was opened."""
        for connection in self._serving:
            if isinstance(connection, NativeConnection):
                connection.refresh()
        return self._stats

    def limits(self) -> Limits:
        """What requests may ask for."""
        geometry = self.access.geometry
        features = self.features
        return Limits(
            size=geometry.size,
            logical_block=geometry.logical_block,
            read_only=self.read_only,
            flush=features.flush,
            barrier=features.barrier,
            discard=features.discard,
            discard_secure=features.discard_secure,
            max_indirect_segments=features.max_indirect_segments,
        )

    def connect(self, frontend: FrontendConfig) -> AnyConnection:
        """Map the rings and bind the ports, for a task that does nothing but `serve` it.

        Raises `GrantFailed` or `PortFailed`, or `DeviceBroken` if storage still works for the last
        one.
        """
        assert self.connection is None, "a disk serves one frontend at a time"
        self.access.require_sound()
        connection = self._make(frontend)
        connection.open()
        self._serving.append(connection)
        self.connection = connection
        return connection

    def _make(self, frontend: FrontendConfig) -> AnyConnection:
        parts = Parts(
            name=self.name,
            devid=self.devid,
            access=self.access,
            stats=self._stats,
            hypervisor=self._hypervisor,
            limits=self.limits(),
            grants=self._grants,
            offer_persistent=self.features.persistent,
            budget=self._budget,
            journal_dir=self._journal_dir,
            paused=self.paused,
        )
        if isinstance(self._extents, NativeExtents):
            assert self._threads is not None
            return NativeConnection(parts, frontend, self._threads, self._extents)
        return Connection(parts, frontend, self._extents)

    async def serve(self, connection: AnyConnection) -> None:
        """Until it is disconnected, or raises what ends it."""
        try:
            await connection.run()
        finally:
            self._serving.remove(connection)
            if self.connection is connection:
                self.connection = None
            if connection.abandoned:
                # What it still writes could come after what would be written there from now on.
                self.access.condemn("storage has not finished what a closed connection asked for")
            if not self._serving:
                self._settling.clear()

    async def disconnect(self, *, drain: bool) -> None:
        """Close the connection, if there is one; `drain` answers first what was taken."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        try:
            if drain:
                await connection.drain()
        finally:
            await connection.aclose()

    async def pause(self) -> None:
        """Answer what was taken, make it durable, and take nothing more until `resume`."""
        self.paused = True
        try:
            for connection in tuple(self._serving):
                await connection.drain()
            if not self.read_only:
                async with self.access.kept_open():
                    await self.access.flush()
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        """Take requests again."""
        self.paused = False
        for connection in self._serving:
            connection.resume()

    async def resize(self, size: int) -> None:
        """Change the size, for the requests of a connected frontend too."""
        try:
            await self.access.resize(size)
        finally:
            for connection in self._serving:
                connection.set_limits(self.limits())

    async def invalidate(self, offset: int, length: int) -> None:
        """For drivers: forget answers of `resolve`; see `OpenContext.invalidate`.

        Raises `DeviceBroken` if storage does not answer: I/O through them may still be in flight.
        """
        self.access.require_sound()
        # What is not known can't be in use, unless somebody else has just made us forget it.
        forgotten = _Forgotten(offset, offset + length)
        known = self._extents.forget(offset, length)
        known = known or any(map(forgotten.touches, self._settling))
        if not known or not self._serving:
            return
        self._settling.append(forgotten)
        for connection in tuple(self._serving):
            await connection.settled(offset, length)
        self.access.require_sound()
        # Who is cancelled does not come here: for that range others have to wait, too.
        if forgotten in self._settling:
            newer = self._settling.index(forgotten) + 1
            self._settling = [
                *(other for other in self._settling[:newer] if not forgotten.covers(other)),
                *self._settling[newer:],
            ]

    def describe(self) -> str | None:
        """How the connected frontend is served; None while there is none."""
        return self.connection.describe() if self.connection is not None else None
