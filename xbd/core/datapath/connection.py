"""One frontend's connection to a disk: its rings, ports and everything that is in flight."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Generic, TypeVar

import attrs
import structlog
import trio

from xbd.core.blkif import BackRing, Decoder, Limits
from xbd.core.datapath.config import DiskStats, FrontendConfig, GrantMode
from xbd.core.datapath.engine import IoEngine, make_engine
from xbd.core.datapath.extents import ExtentCache
from xbd.core.datapath.journal import Debt, Journal, JournalMemory, RingIdentity
from xbd.core.datapath.pages import DomainBudget, RingShare, choose_mode, make_pages
from xbd.core.datapath.recovery import take_over
from xbd.core.datapath.ring_server import RingServer
from xbd.core.datapath.undo import Undo
from xbd.core.driver import DeviceAccess
from xbd.core.hostio.fence import full_fence
from xbd.core.hypervisor import EventChannel, Hypervisor
from xbd.core.units import GrantRef

_log = structlog.get_logger()
JournalT = TypeVar("JournalT", bound=JournalMemory)


@attrs.frozen(kw_only=True)
class Parts:
    """What a connection is made from: an opened disk's side of it."""

    name: str
    devid: int
    access: DeviceAccess
    stats: DiskStats
    hypervisor: Hypervisor
    limits: Limits
    grants: GrantMode
    offer_persistent: bool
    budget: DomainBudget
    journal_dir: Path | None
    paused: bool
    """Take no requests until `resume`."""


@attrs.frozen
class OpenedRing(Generic[JournalT]):
    """A ring mapped, its port bound, its journal begun; `debt` is what an earlier backend left."""

    ring: BackRing
    address: int
    """Of its pages."""
    channel: EventChannel
    journal: JournalT
    debt: Debt


def open_ring(
    parts: Parts, frontend: FrontendConfig, number: int, undo: Undo, kind: type[JournalT]
) -> OpenedRing[JournalT]:
    """With a journal of this kind.  Raises `GrantFailed` or `PortFailed`; `undo` gives everything
    back."""
    queue = frontend.queues[number]
    abi = frontend.abi
    mapping = parts.hypervisor.map_grants(frontend.domid, queue.ring_refs, writable=True)
    undo.later(mapping.unmap)
    ring = BackRing(mapping.view, abi, frontend.ring_order, fence=full_fence, attach=True)
    undo.later(ring.release)
    channel = parts.hypervisor.bind_interdomain(frontend.domid, queue.event_channel)
    undo.later(channel.close)
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
    journal = kind(identity, ring.entries, abi.request_size, path, debt)
    undo.later(journal.close)
    return OpenedRing(ring, mapping.address, channel, journal, debt)


class Connection:
    """Serves all rings of one frontend until it is closed.  `open` it, and `run` it at once."""

    def __init__(self, parts: Parts, frontend: FrontendConfig, extents: ExtentCache) -> None:
        self.frontend = frontend
        self._parts = parts
        self._extents = extents
        self._engine: IoEngine = make_engine()
        self._undo = Undo()
        self.abandoned = False
        """Whether it has ended, and storage not finished what it was asked for."""
        self._scope = trio.CancelScope()
        self._released = trio.Event()
        self._servers: list[RingServer] = []
        self._intake = trio.CancelScope()
        self._taking = trio.Event()
        self._resting = trio.Event()
        self._resting.set()
        if not parts.paused:
            self._taking.set()
        self.mode = choose_mode(
            parts.grants,
            parts.hypervisor,
            persistent=frontend.persistent and parts.offer_persistent,
        )

    def open(self) -> None:
        """Map and bind.  Raises `GrantFailed` or `PortFailed`; nothing is left over then."""
        try:
            for number in range(len(self.frontend.queues)):
                self._servers.append(self._open_ring(number))
        except BaseException:
            self._release()
            raise
        for server in self._servers:
            server.journal.untouched = False

    async def run(self) -> None:
        """Serve; gives everything back on the way out.

        Raises `RingCorrupt` or what a driver raises to have its device closed.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for server in self._servers:
                        server.nursery = nursery
                    nursery.start_soon(self._engine.run)
                    await self._serve()
        finally:
            self._release()

    async def _serve(self) -> None:
        while True:
            while not self._taking.is_set():
                await self._taking.wait()
            self._resting = trio.Event()
            try:
                with trio.CancelScope() as self._intake:
                    async with trio.open_nursery() as rings:
                        for server in self._servers:
                            rings.start_soon(server.run)
            finally:
                self._resting.set()

    def _open_ring(self, number: int) -> RingServer:
        parts = self._parts
        frontend = self.frontend
        opened = open_ring(parts, frontend, number, self._undo, Journal)
        share = RingShare(parts.budget, parts.limits.max_indirect_segments)
        entries = opened.ring.entries
        server = RingServer(
            name=parts.name,
            ring=opened.ring,
            decoder=Decoder(frontend.abi, parts.limits),
            journal=opened.journal,
            pages=make_pages(self.mode, parts.hypervisor, frontend.domid, share, entries),
            channel=opened.channel,
            access=parts.access,
            extents=self._extents,
            engine=self._engine,
            stats=parts.stats,
        )
        server.owe(opened.debt.requests)
        return server

    def _release(self) -> None:
        """Nothing runs any more.  What the kernel still works on stays mapped, on purpose."""
        with ExitStack() as stack:  # whatever fails on the way, nobody waits for ever
            stack.callback(self._released.set)
            for server in self._servers:
                stack.callback(server.forsake)
            stack.callback(self._undo.close)
            stack.callback(self._engine.close)
            if not self._engine.in_flight:
                for server in self._servers:
                    stack.callback(server.release)
                return
            self.abandoned = True
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
        """The disk's size changed: requests that come from now on are judged by the new one."""
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
        self._taking = trio.Event()
        self._intake.cancel()
        await self._resting.wait()
        for server in self._servers:
            await server.drained()

    def resume(self) -> None:
        """Take requests again after `drain`, or for the first time."""
        self._taking.set()

    async def aclose(self) -> None:
        """Stop, unmap, unbind.  Requests in flight are abandoned: `drain` first."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._released.wait()

    def describe(self) -> str:
        """For ``xbd list``: data path, engine and how pages are reached."""
        return f"python, {self._engine.name}, {self.mode.value}"
