"""One frontend's connection to a disk: its rings, ports and everything that is in flight."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import attrs
import structlog
import trio

from xbd.core.blkif import BackRing, Decoder, Limits
from xbd.core.datapath.config import DiskStats, FrontendConfig, GrantMode, QueueConfig
from xbd.core.datapath.engine import IoEngine, make_engine
from xbd.core.datapath.extents import ExtentCache
from xbd.core.datapath.journal import Journal, RingIdentity
from xbd.core.datapath.pages import DomainBudget, RingShare, choose_mode, make_pages
from xbd.core.datapath.recovery import take_over
from xbd.core.datapath.ring_server import RingServer
from xbd.core.driver import DeviceAccess
from xbd.core.hostio.fence import full_fence
from xbd.core.hypervisor import Hypervisor
from xbd.core.units import GrantRef

_log = structlog.get_logger()


@attrs.frozen(kw_only=True)
class Parts:
    """What a connection is made from: an opened disk's side of it."""

    name: str
    devid: int
    access: DeviceAccess
    extents: ExtentCache
    stats: DiskStats
    hypervisor: Hypervisor
    limits: Limits
    grants: GrantMode
    offer_persistent: bool
    budget: DomainBudget
    journal_dir: Path | None


class Connection:
    """Serves all rings of one frontend until it is closed."""

    def __init__(self, parts: Parts, frontend: FrontendConfig) -> None:
        self.frontend = frontend
        self._parts = parts
        self._engine: IoEngine = make_engine()
        self._resources = ExitStack()
        self._scope = trio.CancelScope()
        self._released = trio.Event()
        self._servers: list[RingServer] = []
        self._intake = trio.CancelScope()
        self.mode = choose_mode(
            parts.grants,
            parts.hypervisor,
            persistent=frontend.persistent and parts.offer_persistent,
        )

    async def run(
        self, *, task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Map, bind, serve; gives everything back on the way out.

        Raises `GrantFailed` or `PortFailed` before it has started, and later `RingCorrupt` or what
        a driver raises to have its device closed.
        """
        try:
            for number, queue in enumerate(self.frontend.queues):
                self._servers.append(self._open_ring(number, queue))
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for server in self._servers:
                        server.nursery = nursery
                    nursery.start_soon(self._engine.run)
                    nursery.start_soon(self._serve)
                    task_status.started(self)
        finally:
            self._release()

    async def _serve(self) -> None:
        with self._intake:
            async with trio.open_nursery() as rings:
                for server in self._servers:
                    rings.start_soon(server.run)

    def _open_ring(self, number: int, queue: QueueConfig) -> RingServer:
        parts = self._parts
        frontend = self.frontend
        abi = frontend.abi
        mapping = parts.hypervisor.map_grants(frontend.domid, queue.ring_refs, writable=True)
        self._resources.callback(mapping.unmap)
        ring = BackRing(mapping.view, abi, frontend.ring_order, fence=full_fence, attach=True)
        self._resources.callback(ring.release)
        channel = parts.hypervisor.bind_interdomain(frontend.domid, queue.event_channel)
        self._resources.callback(channel.close)
        identity = RingIdentity(
            domid=frontend.domid,
            devid=parts.devid,
            queue=number,
            ring_order=frontend.ring_order,
            event_channel=queue.event_channel,
            ring_refs=tuple(GrantRef(ref) for ref in queue.ring_refs),
            protocol=abi.protocol,
        )
        path = parts.journal_dir and parts.journal_dir / f"{parts.name}.{number}"
        debt = take_over(path, identity, ring)
        journal = Journal(identity, ring.entries, abi.request_size, path, debt)
        self._resources.callback(journal.close)
        share = RingShare(parts.budget, parts.limits.max_indirect_segments)
        server = RingServer(
            name=parts.name,
            ring=ring,
            decoder=Decoder(abi, parts.limits),
            journal=journal,
            pages=make_pages(self.mode, parts.hypervisor, frontend.domid, share, ring.entries),
            channel=channel,
            access=parts.access,
            extents=parts.extents,
            engine=self._engine,
            stats=parts.stats,
        )
        server.owe(debt.requests)
        return server

    def _release(self) -> None:
        """Nothing runs any more.  What the kernel still works on stays mapped, on purpose."""
        with ExitStack() as stack:  # whatever fails on the way, nobody waits for ever
            stack.callback(self._released.set)
            stack.push(self._resources)
            stack.callback(self._engine.close)
            if not self._engine.in_flight:
                for server in self._servers:
                    stack.callback(server.release)
                return
            _log.error(
                "storage does not answer; its memory stays mapped",
                device=self._parts.name,
                requests=self._engine.in_flight,
            )

    @property
    def in_flight(self) -> int:
        """Requests consumed and not answered."""
        return sum(server.in_flight for server in self._servers)

    def set_limits(self, limits: Limits) -> None:
        """The disk's size changed: judge requests by the new one."""
        for server in self._servers:
            server.decoder.limits = limits

    async def settled(self, offset: int, length: int) -> None:
        """Wait until no transfer that is in flight now touches the range any more."""
        for server in self._servers:
            old = server.transfers(offset, length)
            while old & server.transfers(offset, length):
                await server.one_answered()

    async def drain(self) -> None:
        """Take no more requests; return when all that were taken are answered."""
        self._intake.cancel()
        for server in self._servers:
            await server.drained()

    async def aclose(self) -> None:
        """Stop, unmap, unbind.  Requests in flight are abandoned: `drain` first."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._released.wait()

    def describe(self) -> str:
        """For ``xbd list``: data path, engine and how pages are reached."""
        return f"python, {self._engine.name}, {self.mode.value}"
