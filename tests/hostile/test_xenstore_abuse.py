"""What a guest may write to XenStore, and how often."""

from __future__ import annotations

import statistics
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from backend_world import Frontend

from xbd.core.backend import bell, device
from xbd.core.blkif.state import XenbusState
from xbd.core.errors import StoreError
from xbd.core.frontend import Toolstack
from xbd.core.units import MIB, PAGE_SIZE
from xbd.core.xenstore.client import StoreClient

pytestmark = pytest.mark.alone

CONNECTED, CLOSING, CLOSED = XenbusState.CONNECTED, XenbusState.CLOSING, XenbusState.CLOSED
INITIALISED, INIT_WAIT = XenbusState.INITIALISED, XenbusState.INIT_WAIT
ABSURD = [
    "", " ", "0x10", "-1", "+1", "1.0", "1e3", "00000000000000000001", "4294967296",
    "18446744073709551616", "9" * 1900, "٣", "１", "1\n2", "1\0", "\x1b[31m1", "\udcff\udcfe",
    "NaN", "\u202e1", "%n%s", "../../0", "1 ", "true",
]  # fmt: skip
NUMBERS = ["ring-ref", "ring-page-order", "num-ring-pages", "event-channel", "feature-persistent",
           "multi-queue-num-queues", "ring-ref0", "queue-0/ring-ref"]  # fmt: skip


@attrs.define
class Attacker:
    """A guest with a XenStore connection of its own, and its rights there."""

    store: StoreClient
    frontend: Frontend
    attachment: object
    path: str

    async def write(self, key: str, value: str) -> None:
        """What XenStore itself refuses has had its end there."""
        with suppress(StoreError, UnicodeEncodeError, ValueError):
            await self.store.write(f"{self.path}/{key}", value)


@asynccontextmanager
async def victim(world):
    """A guest that only wants to work."""
    image = world.image("victim.img")
    async with world.guest() as domain:
        attachment = await world.attach(domain.domid, f"imagefile:{image}")
        frontend = Frontend(attachment, domain)
        await frontend.connect()
        yield frontend


@asynccontextmanager
async def attacker(world, **options):
    image = world.image("attacker.img")
    async with world.guest() as domain:
        toolstack = Toolstack(world.store)
        await toolstack.create_domain(domain.domid, "attacker")
        attachment = await world.attach(domain.domid, f"imagefile:{image}", **options)
        path = attachment.frontend
        own = [f"n{domain.domid}", "r0"]
        await world.store.set_permissions(path, own)
        for name in await world.store.directory(path):
            await world.store.set_permissions(f"{path}/{name}", own)
        await attachment.until_state(INIT_WAIT)
        socket = world.directory / f"xenstored-{domain.domid}.socket"
        async with StoreClient.connect(socket) as store:
            yield Attacker(store, Frontend(attachment, domain), attachment, path)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


async def latency(frontend) -> float:
    """Seconds for a sector, there and back, in the median of some."""
    found = []
    for number in range(20):
        begin = time.perf_counter()
        await frontend.write_sector(number, bytes([number]) * 512)
        assert await frontend.read_sector(number) == bytes([number]) * 512
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


async def test_absurd_values_in_every_key(world, monkeypatch):
    """Each is refused in one line or harmless; the disk comes back when the guest begins anew."""
    monkeypatch.setattr(bell, "_LOOK_PAUSE_SECONDS", 1e-6)  # so many looks are meant here
    monkeypatch.setattr(device, "_CONNECT_PAUSE_SECONDS", 1e-6)
    await world.start(limits=attrs.evolve(world.policy.limits, failures=1000))
    async with victim(world) as good, attacker(world) as bad:
        frontend = bad.frontend
        await frontend.make_ring()
        refused = 0

        async def try_to_connect() -> XenbusState:
            for name, right in frontend.keys().items():
                if name not in spoiled:
                    await bad.write(name, str(right))
            await bad.write("state", str(int(INITIALISED)))
            found = await bad.attachment.until_state(CONNECTED, CLOSING, CLOSED)
            await bad.write("state", str(int(CLOSED)))
            await bad.attachment.until_state(CLOSED)
            for name in spoiled:
                with suppress(StoreError):
                    await bad.store.remove(f"{bad.path}/{name}")
            await bad.write("state", "1")
            await bad.attachment.until_state(INIT_WAIT)
            return XenbusState(int(found))

        for number, key in enumerate([*NUMBERS, "protocol"]):
            for value in ABSURD[number % 3 :: 3]:
                spoiled = [key]
                await bad.write(key, value)
                refused += await try_to_connect() is not CONNECTED
        for value in ABSURD:
            await bad.write("state", value)
        assert refused > 30
        spoiled = []
        assert await try_to_connect() is CONNECTED
        assert await latency(good) < 0.1
    assert all(len(entry["event"]) < 600 and entry["event"].isprintable() for entry in world.log)


async def test_a_flood_of_writes_by_a_guest(world):
    """Its state, below its state, other keys: as fast as XenStore takes them."""
    await world.start()
    async with victim(world) as good, attacker(world) as bad, trio.open_nursery() as nursery:
        written = 0

        async def flood(number: int) -> None:
            nonlocal written
            count = 0
            while True:
                count += 1
                await bad.write("state", str(count % 9))
                await bad.write(f"state/{number}/{count % 50}", "x" * 1000)
                await bad.write(f"junk{number}", "y" * 1900)
                written += 3

        for number in range(4):
            nursery.start_soon(flood, number)
        await latency(good)
        before = resident_bytes()
        begin = written
        reads = 0
        its_device = world.device(bad.attachment)
        original = its_device._node.read

        async def counting():
            nonlocal reads
            reads += 1
            return await original()

        its_device._node.read = counting
        start = time.perf_counter()
        waits = []
        while written - begin < 3000:
            waits.append(await latency(good))
        seconds = time.perf_counter() - start
        assert resident_bytes() - before < 8 * MIB
        assert statistics.median(waits) < 0.1
        assert reads < 64 + 100 * (seconds + 1)
        nursery.cancel_scope.cancel()
    assert len(world.log) < 60


async def test_rapid_connecting_and_closing(any_world):
    """XSA-350: what one connection had is given back before the next, and it all takes its time."""
    world = any_world
    await world.start()
    async with victim(world) as good, attacker(world) as bad:
        frontend = bad.frontend
        await frontend.make_ring()
        for name, value in frontend.keys().items():
            await bad.write(name, str(value))
        before = world.host.hypervisor.mapped_pages
        states = [INITIALISED, CONNECTED, CLOSING, CLOSED, 1, INITIALISED, CLOSING, 1, CONNECTED, 7]
        for number in range(300):
            await bad.write("state", str(int(states[number % len(states)])))
            if number % 50 == 0:
                assert await latency(good) < 0.1
            assert world.host.hypervisor.mapped_pages <= before + 1
            assert world.host.hypervisor.bound_ports <= 2
        await bad.write("state", str(int(CLOSING)))
        with trio.fail_after(20):
            while world.device(bad.attachment).frontend is not None:
                await bad.write("state", str(int(CLOSED)))
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert world.host.hypervisor.mapped_pages == before
    assert len(world.log) < 80


async def test_a_disk_that_can_t_be_opened_is_no_means_to_flood_the_log(world):
    """The image went away; the guest begins anew and anew."""
    await world.start()
    async with attacker(world) as bad:
        frontend = bad.frontend
        (world.directory / "attacker.img").unlink()
        (world.directory / "attacker.img").mkdir()
        await frontend.make_ring()
        for name, value in frontend.keys().items():
            await bad.write(name, str(value))
        await bad.attachment.set("state", 1)  # the toolstack attaches it anew
        lines = len(world.log)
        begin = time.perf_counter()
        for _ in range(60):
            for state in (INITIALISED, CLOSED, 1):
                await bad.write("state", str(int(state)))
                await trio.testing.wait_all_tasks_blocked(0.002)
        seconds = time.perf_counter() - begin
    assert len(world.log) - lines < 30 + 3 * seconds


async def test_two_queues_that_share_a_page_are_refused(world):
    await world.start()
    async with attacker(world) as bad:
        await bad.frontend.make_ring()
        ref, port = bad.frontend.refs[0], bad.frontend.port.port
        await bad.write("multi-queue-num-queues", "2")
        for queue in (0, 1):
            await bad.write(f"queue-{queue}/ring-ref", str(ref))
            await bad.write(f"queue-{queue}/event-channel", str(port + queue))
        await bad.write("protocol", "x86_64-abi")
        await bad.write("state", str(int(INITIALISED)))
        await bad.attachment.until_state(CLOSING, CLOSED)
        assert world.said("share a ring page")


@pytest.mark.parametrize("phase", ["waiting", "connected", "closing"])
async def test_a_frontend_whose_nodes_vanish(any_world, phase):
    world = any_world
    await world.start()
    async with victim(world) as good, attacker(world) as bad:
        frontend = bad.frontend
        if phase != "waiting":
            await frontend.make_ring()
            for name, value in frontend.keys().items():
                await bad.write(name, str(value))
            await bad.write("state", str(int(INITIALISED)))
            await bad.attachment.until_state(CONNECTED)
        if phase == "closing":
            await bad.write("state", str(int(CLOSING)))
        await bad.store.remove(bad.path)
        if phase != "waiting":
            await bad.attachment.until_state(CLOSED)
        assert await latency(good) < 0.1
