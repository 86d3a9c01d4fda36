"""An opened disk, ready for frontends to come and go."""

from __future__ import annotations

from pathlib import Path

import trio

from xbd.core.blkif import Limits
from xbd.core.datapath.config import DiskStats, Features, FrontendConfig, GrantMode
from xbd.core.datapath.connection import Connection, Parts
from xbd.core.datapath.extents import ExtentCache
from xbd.core.datapath.pages import DomainBudget
from xbd.core.driver import DeviceAccess
from xbd.core.hypervisor import Hypervisor


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
    ) -> None:
        """`budget`: what all disks of the guest share; None: this one has its own."""
        self.access = access
        self.name = name
        self.devid = devid
        self.read_only = read_only
        self.features = features
        self.stats = DiskStats()
        self.connection: Connection | None = None
        self._extents = ExtentCache(access.resolve)
        self._hypervisor = hypervisor
        self._grants = grants
        self._journal_dir = journal_dir
        self._budget = budget or DomainBudget()
        access.subscribe(self.invalidate)

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

    async def connect(self, nursery: trio.Nursery, frontend: FrontendConfig) -> Connection:
        """Map the rings, bind the ports and serve, in tasks of `nursery`.

        Raises `GrantFailed` or `PortFailed`; what goes wrong later is raised into the nursery.
        """
        assert self.connection is None, "a disk serves one frontend at a time"
        parts = Parts(
            name=self.name,
            devid=self.devid,
            access=self.access,
            extents=self._extents,
            stats=self.stats,
            hypervisor=self._hypervisor,
            limits=self.limits(),
            grants=self._grants,
            offer_persistent=self.features.persistent,
            budget=self._budget,
            journal_dir=self._journal_dir,
        )
        connection = Connection(parts, frontend)
        await nursery.start(connection.run)
        self.connection = connection
        return connection

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

    def resized(self) -> None:
        """The device's geometry changed."""
        if self.connection is not None:
            self.connection.set_limits(self.limits())

    async def invalidate(self, offset: int, length: int) -> None:
        """For drivers: forget answers of `resolve`; see `OpenContext.invalidate`."""
        self._extents.forget(offset, length)
        if self.connection is not None:
            await self.connection.settled(offset, length)

    def describe(self) -> str | None:
        """How the connected frontend is served; None while there is none."""
        return self.connection.describe() if self.connection is not None else None
