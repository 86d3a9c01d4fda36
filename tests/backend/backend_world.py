"""An embedded host with a supervisor, and scripted guests and toolstacks to try it with.

`Attachment` writes what libxl writes, `Guest` is as small a frontend as can be: it writes keys and
states exactly as a test says, and reads or writes single sectors through its rings.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import structlog
import trio

from xbd.core.backend.device import Services
from xbd.core.backend.identity import DeviceId
from xbd.core.backend.policy import Limits, Policy
from xbd.core.backend.supervisor import Supervisor
from xbd.core.blkif import X86_64, FrontRing, constants
from xbd.core.blkif.encode import encode_rw
from xbd.core.blkif.state import XenbusState
from xbd.core.datapath.native.threads import HOST_PAGES, NativeThreads
from xbd.core.hostio.fence import full_fence
from xbd.core.hypervisor.embedded import EmbeddedHost
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import PAGE_SIZE, Domid
from xbd.core.xenstore.client import StoreClient
from xbd.core.xenstore.server import EmbeddedXenStore

SECONDS = 10.0
"""The deadline of every wait in these tests."""
BASE = "/local/domain/0"
XVDA = 51712
MIB = 1 << 20


@asynccontextmanager
async def embedded_world(
    directory: Path, policy: Policy | None = None, threads: NativeThreads | None = None
):
    directory = directory / "host"
    with structlog.testing.capture_logs() as log:
        async with (
            EmbeddedHost.open(directory) as host,
            EmbeddedXenStore.serve(directory) as server,
            StoreClient.connect(server.path) as store,
            trio.open_nursery() as nursery,
        ):
            world = World(directory, host, server, store, nursery, log, threads)
            world.policy = policy or world.policy
            yield world
            nursery.cancel_scope.cancel()


class World:
    def __init__(self, directory, host, server, store, nursery, log, threads=None):
        self.directory = directory
        self.host = host
        self.server = server
        self.store = store
        self.nursery = nursery
        self.log = log
        self.threads = threads
        # Scripted guests don't close by themselves: don't wait for them.
        limits = Limits(frontend_seconds=0.05)
        self.policy = Policy(journal_dir=directory / "journal", limits=limits)
        self.supervisor = None
        self._ended = trio.Event()

    # -- the daemon's part ------------------------------------------------------------------

    async def start(self, *kinds, **policy):
        """Start the supervisor, and wait until it has looked at everything."""
        self.policy = attrs.evolve(self.policy, **policy)
        services = Services(
            store=self.store,
            base=BASE,
            hypervisor=self.host.hypervisor,
            policy=self.policy,
            threads=self.threads,
        )
        self.supervisor = Supervisor(services, list(kinds) or ["vbd3"])
        self._ended = trio.Event()
        self.nursery.start_soon(self._run)
        with trio.fail_after(SECONDS):
            await self.supervisor.scanned.wait()

    async def _run(self):
        try:
            await self.supervisor.run()
        finally:
            self._ended.set()

    async def stop(self):
        self.supervisor.stop()
        with trio.fail_after(SECONDS):
            await self._ended.wait()

    async def finish(self):
        """The end of every test: all is given back, and nobody met a bug."""
        if self.supervisor is not None and not self._ended.is_set():
            self.supervisor.stop()
            with trio.fail_after(30):
                await self._ended.wait()
        assert self.host.hypervisor.mapped_pages == 0
        assert self.host.hypervisor.bound_ports == 0
        assert self.threads is None or self.threads.pages_left == HOST_PAGES
        assert not [entry for entry in self.log if entry.get("exc_info")]

    def device(self, attachment):
        return self.supervisor.devices[attachment.id]

    def said(self, text):
        return [entry["event"] for entry in self.log if text in entry["event"]]

    # -- looking and waiting ----------------------------------------------------------------

    async def until(self, path, check, what):
        """Wait until the value at `path` passes `check`; return it."""
        value = None
        try:
            with trio.fail_after(SECONDS):
                async with self.store.watch(path) as watch:
                    while True:
                        await watch.changed()
                        value = await self.store.read(path)
                        if check(value):
                            return value
        except trio.TooSlowError:
            pytest_fail = f"{path} is {value!r}, and not {what}"
            raise AssertionError(pytest_fail) from None

    async def until_gone(self, attachment):
        with trio.fail_after(SECONDS):
            while attachment.id in self.supervisor.devices:
                await trio.testing.wait_all_tasks_blocked(0.005)

    # -- the toolstack's part ---------------------------------------------------------------

    def image(self, name="disk.img", size=MIB):
        path = self.directory / name
        path.write_bytes(bytes(size))
        return path

    @asynccontextmanager
    async def guest(self, domid=None):
        async with GuestDomain.connect(self.directory, domid, pages=256, reconnect=False) as domain:
            yield domain

    async def attach(self, domid, disk, **options):
        attachment = Attachment(self, DeviceId(options.pop("kind", "vbd3"), Domid(domid), XVDA))
        attachment = attrs.evolve(attachment, **options)
        await attachment.write(disk)
        return attachment


@attrs.define(eq=False)
class Attachment:
    """A disk from the toolstack's side."""

    world: World
    id: DeviceId
    devid: int = XVDA
    mode: str = "w"
    script: str = "/etc/xen/scripts/block-xbd"
    connected: bool = True
    extra: dict = attrs.field(factory=dict)

    def __attrs_post_init__(self):
        self.id = DeviceId(self.id.kind, self.id.domid, self.devid)

    @property
    def path(self):
        return self.id.path(BASE)

    @property
    def frontend(self):
        return f"/local/domain/{self.id.domid}/device/vbd/{self.devid}"

    async def write(self, disk):
        """What libxl writes for an attach, in one transaction."""
        backend = {
            "frontend": self.frontend,
            "frontend-id": self.id.domid,
            "params": f"aio:{disk}",
            "script": self.script,
            "online": 1,
            "removable": 0,
            "bootable": 1,
            "state": 1,
            "dev": "xvda",
            "type": self.id.kind,
            "mode": self.mode,
            "device-type": "disk",
            "discard-enable": 1,
            "specification": "xen",
            **self.extra,
        }
        if self.connected:
            backend["hotplug-status"] = "connected"
        frontend = {
            "backend": self.path,
            "backend-id": 0,
            "state": 1,
            "virtual-device": self.devid,
            "device-type": "disk",
        }

        async def body(tree):
            for key, value in frontend.items():
                await tree.write(f"{self.frontend}/{key}", str(value))
            for key, value in backend.items():
                if value is not None:
                    await tree.write(f"{self.path}/{key}", str(value))

        await self.world.store.transact(body)

    async def key(self, name):
        return await self.world.store.read(f"{self.path}/{name}")

    async def set(self, name, value):
        await self.world.store.write(f"{self.path}/{name}", str(value))

    async def until_state(self, *states):
        wanted = [str(int(state)) for state in states]
        return await self.world.until(f"{self.path}/state", lambda v: v in wanted, wanted)

    async def order_detach(self):
        """The first half of libxl's detach."""

        async def body(tree):
            await tree.write(f"{self.path}/online", "0")
            await tree.write(f"{self.path}/state", "5")

        await self.world.store.transact(body)

    async def remove(self):
        """The second half."""
        await self.world.store.remove(self.path)
        await self.world.store.remove(self.frontend)

    async def error_node(self):
        return await self.world.store.read(f"{BASE}/error/{self.id.node}/error")


class Frontend:
    """A scripted blkfront with one ring of one page."""

    def __init__(self, attachment, domain):
        self.attachment = attachment
        self.store = attachment.world.store
        self.domain = domain
        self.port = None
        self.ring = None
        self.refs = []
        self.data = None
        self._next_id = 0

    async def write(self, **keys):
        for key, value in keys.items():
            name = key.replace("_", "-")
            await self.store.write(f"{self.attachment.frontend}/{name}", str(value))

    async def remove(self, *names):
        for name in names:
            await self.store.remove(f"{self.attachment.frontend}/{name}")

    async def state(self, state):
        await self.write(state=int(state))

    async def make_ring(self, order=0):
        """New ring and port; nothing is written to XenStore."""
        self.refs = sorted(self.domain.alloc_pages(1 << order))
        first = self.refs[0]
        view = self.domain.memory[first * PAGE_SIZE : (first + len(self.refs)) * PAGE_SIZE]
        view[:] = bytes(len(view))
        for ref in self.refs:
            self.domain.grant(ref, Domid(0))
        self.ring = FrontRing(view, X86_64, order, fence=full_fence)
        self.port = await self.domain.alloc_port(Domid(0))
        if self.data is None:
            (self.data,) = self.domain.alloc_pages(1)
            self.domain.grant(self.data, Domid(0))

    def keys(self):
        keys = {"event-channel": self.port.port, "protocol": X86_64.protocol}
        if len(self.refs) == 1:
            keys["ring-ref"] = self.refs[0]
        else:
            keys["ring-page-order"] = (len(self.refs) - 1).bit_length()
            keys |= {f"ring-ref{i}": ref for i, ref in enumerate(self.refs)}
        return keys

    async def publish(self, state=XenbusState.INITIALISED):
        """Keys and state, in one transaction as Linux does."""

        async def body(tree):
            for name, value in (self.keys() | {"state": int(state)}).items():
                await tree.write(f"{self.attachment.frontend}/{name}", str(value))

        await self.store.transact(body)

    async def connect(self, order=0):
        await self.attachment.until_state(XenbusState.INIT_WAIT)
        await self.make_ring(order)
        await self.publish()
        await self.attachment.until_state(XenbusState.CONNECTED)
        await self.state(XenbusState.CONNECTED)

    def submit(self, operation, sector, sectors=1):
        request = self._next_id
        self._next_id += 1
        segment = (self.data, 0, sectors - 1)
        self.ring.submit(
            encode_rw(X86_64, operation, request, sector, [segment], self.attachment.devid)
        )
        if self.ring.push():
            self.port.notify()
        return request

    async def answer(self):
        """The next answers, at least one."""
        with trio.fail_after(SECONDS):
            while True:
                if responses := self.ring.responses():
                    return responses
                if not self.ring.final_check():
                    await trio.lowlevel.wait_readable(self.port.fd)
                    self.port.take()

    async def rw(self, operation, sector=0, sectors=1):
        request = self.submit(operation, sector, sectors)
        ((answered, op, status),) = await self.answer()
        assert (answered, op) == (request, operation)
        return status

    async def write_sector(self, sector, data):
        self.domain.page(self.data)[: len(data)] = data
        assert await self.rw(constants.WRITE, sector) == constants.RSP_OKAY

    async def read_sector(self, sector):
        assert await self.rw(constants.READ, sector) == constants.RSP_OKAY
        return bytes(self.domain.page(self.data)[:512])

    def drop_ring(self):
        """Forget the ring, as a new kernel does; its pages are gone for the backend too."""
        for ref in self.refs:
            with suppress(KeyError):
                self.domain.revoke(ref)
        self.domain.free_pages(self.refs)
        self.port.close()
        self.refs, self.ring, self.port = [], None, None
