"""A server on a memory disk."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager

import attrs
import trio
from nbd_client import Client

from xbd.core.driver import BlockDevice, Concurrency, DeviceAccess, Geometry
from xbd.core.driver.testing import MemoryDevice
from xbd.core.nbd import Export, Limits, NbdServer
from xbd.core.nbd.engine import ThreadEngine, UringEngine

ENGINES = {"io_uring": UringEngine, "threads": ThreadEngine}

SIZE = 1 << 20
SECONDS = 30.0


@attrs.define
class Rig:
    server: NbdServer
    access: DeviceAccess
    nursery: trio.Nursery
    clients: list[Client] = attrs.field(factory=list)

    def connect(self) -> Client:
        """A client that has not said anything yet."""
        ours, theirs = socket.socketpair()
        self.nursery.start_soon(self.server.serve_client, theirs)
        self.clients.append(Client(trio.SocketStream(trio.socket.from_stdlib_socket(ours))))
        return self.clients[-1]

    async def client(self, **how) -> Client:
        """A client in its transmission phase."""
        return await self.connect().negotiate(**how)


def memory(size: int = SIZE, *, geometry: dict[str, int] | None = None, **how) -> MemoryDevice:
    return MemoryDevice(size, geometry=Geometry(size=size, **(geometry or {})), **how)


@asynccontextmanager
async def serving(
    device: BlockDevice | DeviceAccess | None = None,
    *,
    limits: Limits | None = None,
    alone: bool = False,
    **export,
):
    """A running server; it must stop in order, with nothing in flight and nothing held."""
    device = device or memory()
    if isinstance(device, DeviceAccess):
        access = device
    else:
        access = DeviceAccess(
            device, device_id="the disk", concurrency=Concurrency.PARALLEL, writable=True
        )
    server = NbdServer(Export(access=access, **export), limits or Limits(), alone=alone)
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, [])
            rig = Rig(server, access, nursery)
            try:
                yield rig
                server.stop()
            finally:
                for client in rig.clients:
                    client.stream.socket.close()
        assert server._budget.bytes == 0
        assert not server._connections
        assert not server._direct._in_flight
        assert server._poller.tasks == 0
        assert access.bugs == 0
        await access.aclose()
