"""A host with a well-behaved guest, and attackers who write rings byte by byte."""

from __future__ import annotations

import struct
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import structlog
import trio
import trio.testing

from xbd.core.backend.bell import Bell
from xbd.core.backend.link import Link
from xbd.core.blkif import X86_64, Abi, constants, encode
from xbd.core.datapath import Disk, Features, FrontendConfig, GrantMode, QueueConfig
from xbd.core.datapath.native.threads import HOST_PAGES, NativeThreads
from xbd.core.datapath.pages import DomainBudget
from xbd.core.driver.api import Concurrency
from xbd.core.driver.open import open_device
from xbd.core.driver.testing import MemoryDevice
from xbd.core.errors import RingCorrupt
from xbd.core.frontend.options import FrontendOptions
from xbd.core.frontend.requests import DiskRequests
from xbd.core.hostio.fence import full_fence
from xbd.core.hypervisor.embedded import EmbeddedHost
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import KIB, MIB, PAGE_SIZE, Domid

SECONDS = 20.0
"""The deadline of every wait in these tests."""


async def until(condition) -> None:
    """Threads serve the rings: what they will have done soon."""
    with trio.fail_after(SECONDS):
        while not condition():
            await trio.lowlevel.checkpoint()


DOM0 = Domid(0)
ATTACKER_PAGES = 3832
"""What all rings of the attacker share beyond their reserves."""

DEVID = 51712
MODES = [GrantMode.PERSISTENT, GrantMode.MAP, GrantMode.COPY]
ALL_FEATURES = Features(discard=True, barrier=True)
U32 = 0xFFFFFFFF


class GivenUp(AssertionError):
    """The backend does not serve this ring any more."""


class RawRing:
    """Shared pages that are only bytes; nothing here keeps to the protocol unless asked to."""

    def __init__(self, guest: GuestDomain, abi: Abi, order: int, start: int = 0) -> None:
        self.guest = guest
        self.abi = abi
        self.order = order
        self.entries = 32 << order
        self.refs = sorted(guest.alloc_pages(1 << order))
        assert self.refs[-1] - self.refs[0] == len(self.refs) - 1, "neighbours are needed"
        first = self.refs[0]
        self.view = guest.memory[first * PAGE_SIZE : (first + len(self.refs)) * PAGE_SIZE]
        self.view[:] = bytes(len(self.view))
        self.words = self.view[:16].cast("I")
        for ref in self.refs:
            guest.grant(ref, DOM0)
        self.words[0] = self.words[2] = self.prod = self.cons = start
        self.words[1] = self.words[3] = (start + 1) & U32
        self.port = None
        self.link = None

    def slot(self, index: int) -> memoryview:
        """The bytes of one entry."""
        size = self.abi.request_size
        at = 64 + (index % self.entries) * size
        return self.view[at : at + size]

    def put(self, *entries: bytes) -> None:
        """Write requests; `publish` tells the backend."""
        for entry in entries:
            self.slot(self.prod)[:] = entry
            self.prod = (self.prod + 1) & U32

    def publish(self) -> None:
        """Tell the backend of all that was put."""
        full_fence()
        self.words[0] = self.prod
        self.port.notify()

    def answers(self) -> list[tuple[int, int, int]]:
        """Take the answers that are there: id, operation, status."""
        found = []
        while self.cons != self.words[2]:
            assert len(found) < self.entries, "more answers than the ring holds"
            request_id, operation, status = struct.unpack("<QBxh", self.slot(self.cons)[:12])
            found.append((request_id, operation, status))
            self.cons = (self.cons + 1) & U32
        return found

    async def collect(self, count: int) -> list[tuple[int, int, int]]:
        """Wait for so many answers."""
        found = self.answers()
        with trio.fail_after(SECONDS):
            while len(found) < count:
                self.words[3] = (self.cons + 1) & U32
                full_fence()
                if self.words[2] == self.cons:
                    await self._event()
                found += self.answers()
        assert len(found) == count
        return found

    async def _event(self) -> None:
        """Wait for the backend; its end is an error."""

        async def end() -> None:
            await self.link._ended.wait()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            await trio.lowlevel.wait_readable(self.port.fd)
            self.port.take()
            nursery.cancel_scope.cancel()
            return
        raise GivenUp from self.link.failure

    async def ask(self, *entries: bytes) -> list[tuple[int, int, int]]:
        """Send requests as a good guest does, and wait for their answers."""
        self.put(*entries)
        self.publish()
        return await self.collect(len(entries))

    def release(self) -> None:
        self.words.release()
        self.view.release()
        for ref in self.refs:
            self.guest.revoke(ref)
        self.guest.free_pages(self.refs)
        self.port.close()


@attrs.define(eq=False)
class Attacker:
    """A guest with a disk, connected as the backend connects it, but for XenStore."""

    host: EmbeddedHost
    guest: GuestDomain
    disk: Disk
    device: object
    link: Link
    rings: list[RawRing]
    abi: Abi
    wants_persistent: bool = True

    @property
    def ring(self) -> RawRing:
        return self.rings[0]

    def config(self, **changes) -> FrontendConfig:
        config = FrontendConfig(
            domid=self.guest.domid,
            abi=self.abi,
            ring_order=self.ring.order,
            queues=tuple(
                QueueConfig(ring_refs=tuple(ring.refs), event_channel=ring.port.port)
                for ring in self.rings
            ),
            persistent=self.wants_persistent,
        )
        return attrs.evolve(config, **changes)

    async def connect(self, **changes) -> None:
        self.link.connect(self.config(**changes))

    async def disconnect(self) -> None:
        """As the backend does when the guest's state becomes Closing."""
        assert await self.link.drain(SECONDS)

    async def until_ended(self) -> BaseException | None:
        """Wait until the backend gave this frontend up; why."""
        with trio.fail_after(SECONDS):
            await self.link._ended.wait()
        return self.link.failure

    async def quiet(self) -> None:
        """Wait until nothing happens any more."""
        with trio.fail_after(SECONDS):
            await trio.testing.wait_all_tasks_blocked(0.003)
            while self.in_flight:
                await trio.testing.wait_all_tasks_blocked(0.003)

    async def consumed(self) -> None:
        """Wait until all that was published is, answered or not; or until the ring is given up.

        Only with rings whose indices nobody has tampered with."""
        with trio.fail_after(SECONDS):
            while self.link.connected:
                answered = sum((ring.words[2] - ring.cons) & U32 for ring in self.rings)
                published = sum((ring.prod - ring.cons) & U32 for ring in self.rings)
                if answered + self.in_flight >= published:
                    break
                await trio.testing.wait_all_tasks_blocked(0.001)
            await trio.testing.wait_all_tasks_blocked(0.001)

    @property
    def in_flight(self) -> int:
        connection = self.disk.connection
        return connection.in_flight if connection is not None else 0

    def pages_in_use(self, field: Battlefield) -> int:
        """For data: mapped ones; in C those beyond the rings' reserves, mapped or bounced."""
        if field.threads is not None:
            return HOST_PAGES - field.threads.pages_left
        rings = sum(len(ring.refs) for ring in self.rings)
        return self.host.hypervisor.mapped_pages - field.mapped - rings

    def pages(self, count: int, *, readonly: bool = False) -> list[int]:
        """Granted pages."""
        refs = self.guest.alloc_pages(count)
        for ref in refs:
            self.guest.grant(ref, DOM0, readonly=readonly)
        return refs

    def rw(self, operation: int, sector: int, segments, request_id: int = 0) -> bytes:
        return encode.encode_rw(self.abi, operation, request_id, sector, segments)

    async def must_serve(self) -> None:
        """A correct request is still served correctly."""
        (page,) = self.pages(1)
        view = self.guest.page(page)
        pattern = struct.pack("<Q", self.ring.prod) * 64
        view[:512] = pattern
        write = self.rw(constants.WRITE, 1, [(page, 0, 0)], 11)
        assert await self.ring.ask(write) == [(11, constants.WRITE, 0)]
        view[:] = bytes(PAGE_SIZE)
        read = self.rw(constants.READ, 1, [(page, 7, 7)], 12)
        assert await self.ring.ask(read) == [(12, constants.READ, 0)]
        assert bytes(view) == bytes(7 * 512) + pattern
        view.release()


@attrs.define(eq=False)
class Battlefield:
    """One host; its victim must never notice anything."""

    host: EmbeddedHost
    victim: DiskRequests
    victim_device: MemoryDevice
    nursery: trio.Nursery
    log: list
    threads: NativeThreads | None = None
    """What serves the rings; None: the data path in Python."""
    mapped: int = 0
    """What the victim has mapped when nobody else is connected."""
    ports: int = 0
    _round: int = 0

    async def victim_is_well(self) -> None:
        """The victim writes, reads back and flushes."""
        self._round += 1
        data = struct.pack("<Q", self._round) * (6 * KIB)
        offset = self._round % 16 * 64 * KIB
        with trio.fail_after(SECONDS):
            await self.victim.write(offset, data)
            assert await self.victim.read(offset, len(data)) == data
            await self.victim.flush()

    def nothing_is_left(self) -> None:
        """Attackers have gone, and so has everything that was done for them."""
        assert self.host.hypervisor.mapped_pages == self.mapped
        assert self.host.hypervisor.bound_ports == self.ports
        assert self.threads is None or self.threads.pages_left == HOST_PAGES

    def lines(self, text: str = "") -> list[str]:
        return [entry["event"] for entry in self.log if text in entry["event"]]

    @asynccontextmanager
    async def attacker(
        self,
        *,
        mode: GrantMode = GrantMode.PERSISTENT,
        abi: Abi = X86_64,
        order: int = 0,
        queues: int = 1,
        start: int = 0,
        device=None,
        features: Features = ALL_FEATURES,
        read_only: bool = False,
        size: int = MIB,
        pages: int = 1024,
        connect: bool = True,
        journal_dir: Path | None = None,
        guest: GuestDomain | None = None,
        alone: bool = True,
        may_fail: type[BaseException] | tuple = RingCorrupt,
    ):
        """An attacker, connected unless told otherwise.

        Whatever it does must end in `may_fail` at worst, and leave nothing behind; where others
        are about (`alone` False) that can't be told.
        """
        device = device or MemoryDevice(size, writable=not read_only)

        @asynccontextmanager
        async def make(_context):
            yield device

        opening = open_device(
            make,
            name="memory:hostile",
            concurrency=Concurrency.PARALLEL,
            device_id="xbdback66i51712",
            writable=not read_only,
        )
        async with (
            opening as access,
            _guest(self.host.directory, guest, pages) as guest,
            trio.open_nursery() as nursery,
        ):
            disk = Disk(
                access,
                name="xbdback66i51712",
                devid=DEVID,
                read_only=read_only,
                features=features,
                hypervisor=self.host.hypervisor,
                grants=mode,
                journal_dir=journal_dir,
                budget=DomainBudget(ATTACKER_PAGES),
                threads=self.threads,
            )
            rings = [RawRing(guest, abi, order, start) for _ in range(queues)]
            for ring in rings:
                ring.port = await guest.alloc_port(DOM0)
            link = Link(disk, nursery, Bell())
            for ring in rings:
                ring.link = link
            persistent = mode is GrantMode.PERSISTENT
            attacker = Attacker(self.host, guest, disk, device, link, rings, abi, persistent)
            if connect:
                await attacker.connect()
            try:
                yield attacker
            finally:
                with trio.CancelScope(shield=True):
                    with trio.move_on_after(SECONDS):
                        await link.abandon()
                for ring in rings:
                    ring.release()
        if link.failure is not None and not isinstance(link.failure, may_fail):
            raise link.failure
        assert not link.connected
        if alone:
            self.nothing_is_left()


@asynccontextmanager
async def _guest(directory: Path, guest: GuestDomain | None, pages: int):
    if guest is not None:
        yield guest
        return
    async with GuestDomain.connect(directory, pages=pages) as new:
        yield new


@asynccontextmanager
async def battlefield(directory: Path, threads: NativeThreads | None = None):
    """A host and its victim, in good health before and after."""
    size = 2 * MIB
    device = MemoryDevice(size)

    @asynccontextmanager
    async def make(_context):
        yield device

    options = FrontendOptions(ring_order=1, queues=2, data_pages=64)
    opening = open_device(
        make,
        name="memory:victim",
        concurrency=Concurrency.PARALLEL,
        device_id="xbdback1i51712",
        writable=True,
    )
    with structlog.testing.capture_logs() as log:
        async with (
            opening as access,
            EmbeddedHost.open(directory) as host,
            GuestDomain.connect(directory, pages=128) as guest,
            trio.open_nursery() as nursery,
        ):
            disk = Disk(
                access,
                name="xbdback1i51712",
                devid=DEVID,
                read_only=False,
                features=ALL_FEATURES,
                hypervisor=host.hypervisor,
                threads=threads,
            )
            front = DiskRequests(guest, options)
            await front.make_queues(options.queues, options.ring_order)
            front.make_data_pages(256)
            config = FrontendConfig(
                domid=guest.domid,
                abi=options.abi,
                ring_order=options.ring_order,
                queues=tuple(
                    QueueConfig(ring_refs=tuple(queue.refs), event_channel=queue.port.port)
                    for queue in front.queues
                ),
                persistent=True,
            )
            nursery.start_soon(disk.serve, disk.connect(config))
            nursery.start_soon(front.run_queues)
            field = Battlefield(host, front, device, nursery, log, threads)
            for _ in range(4):  # until all its pages are mapped
                await field.victim_is_well()
            await front.read(0, 256 * KIB)
            await front.read(0, 256 * KIB)
            field.mapped = host.hypervisor.mapped_pages
            field.ports = host.hypervisor.bound_ports
            yield field
            await field.victim_is_well()
            field.nothing_is_left()
            assert disk.stats.errors == 0
            assert not [entry for entry in log if entry.get("exc_info")]
            await disk.disconnect(drain=True)
            nursery.cancel_scope.cancel()
            front.release()
