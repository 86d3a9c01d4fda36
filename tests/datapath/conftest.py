"""A disk served over real shared memory to a frontend, with no XenStore between them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from data_paths import NATIVE, NATIVE_PREADV, PYTHON, threads_of

from xbd.core.datapath import Disk, Features, FrontendConfig, GrantMode, QueueConfig
from xbd.core.datapath.native.threads import NativeThreads
from xbd.core.datapath.pages import DomainBudget
from xbd.core.driver import DeviceAccess
from xbd.core.driver.api import Concurrency
from xbd.core.driver.open import open_device
from xbd.core.driver.testing import MemoryDevice
from xbd.core.frontend.options import FrontendOptions
from xbd.core.frontend.requests import DiskRequests
from xbd.core.hypervisor.embedded import EmbeddedHost
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import MIB

for room in ("native", "driver"):
    sys.path.insert(0, str(Path(__file__).parent.parent / room))

DEVID = 51712
NAME = "xbdback1i51712"


def _files(directory: Path) -> list[Path]:
    return list(directory.iterdir())


@attrs.define
class Rig:
    """Both sides of one disk."""

    host: EmbeddedHost
    guest: GuestDomain
    disk: Disk
    front: DiskRequests
    device: object
    access: DeviceAccess
    nursery: trio.Nursery
    make_disk: Callable[[NativeThreads | None], Disk]
    """Another one in the place of `disk`, over any data path."""

    def config(self) -> FrontendConfig:
        front = self.front
        return FrontendConfig(
            domid=self.guest.domid,
            abi=front.options.abi,
            ring_order=(len(front.queues[0].refs) - 1).bit_length(),
            queues=tuple(
                QueueConfig(ring_refs=tuple(queue.refs), event_channel=queue.port.port)
                for queue in front.queues
            ),
            persistent=front.persistent,
        )

    async def connect(self) -> None:
        self.nursery.start_soon(self.disk.serve, self.disk.connect(self.config()))

    async def die(self, journals: Path) -> None:
        """What a killed daemon leaves behind: the journals as they were just now."""
        left = {path: path.read_bytes() for path in _files(journals)}
        await self.disk.disconnect(drain=False)
        for path, journal in left.items():
            path.write_bytes(journal)


@asynccontextmanager
async def make_rig(
    directory: Path,
    *,
    device=None,
    access: DeviceAccess | None = None,
    options: FrontendOptions | None = None,
    features: Features | None = None,
    grants: GrantMode = GrantMode.AUTO,
    read_only: bool = False,
    journal_dir: Path | None = None,
    size: int = 4 * MIB,
    budget: DomainBudget | None = None,
    threads: NativeThreads | None = None,
):
    """A connected rig over `device` (a MemoryDevice by default) or an opened `access`."""
    options = options or FrontendOptions(data_pages=600, indirect_segments=256)
    async with AsyncExitStack() as stack:
        if access is None:
            device = device or MemoryDevice(size, writable=not read_only)

            @asynccontextmanager
            async def make(context):
                yield device

            access = await stack.enter_async_context(
                open_device(
                    make,
                    name="memory:test",
                    concurrency=Concurrency.PARALLEL,
                    device_id=NAME,
                    writable=not read_only,
                )
            )
        host = await stack.enter_async_context(EmbeddedHost.open(directory))
        guest = await stack.enter_async_context(GuestDomain.connect(directory, pages=4096))
        nursery = await stack.enter_async_context(trio.open_nursery())
        features = features or Features(discard=True, barrier=True)

        def make_disk(threads: NativeThreads | None) -> Disk:
            return Disk(
                access,
                name=NAME,
                devid=DEVID,
                read_only=read_only,
                features=features,
                hypervisor=host.hypervisor,
                grants=grants,
                journal_dir=journal_dir,
                budget=budget,
                threads=threads,
            )

        front = DiskRequests(guest, options)
        await front.make_queues(options.queues, options.ring_order)
        front.make_data_pages(features.max_indirect_segments)
        disk = make_disk(threads)
        rig = Rig(host, guest, disk, front, device, access, nursery, make_disk)
        await rig.connect()
        nursery.start_soon(front.run_queues)
        yield rig
        await rig.disk.disconnect(drain=True)
        assert host.hypervisor.mapped_pages == 0
        assert host.hypervisor.bound_ports == 0
        nursery.cancel_scope.cancel()
        front.release()


@pytest.fixture(params=[PYTHON, NATIVE, NATIVE_PREADV])
def native_threads(request):
    """What serves the rings: None for the data path in Python."""
    with threads_of(request.param) as threads:
        yield threads


@pytest.fixture
def rig_maker(tmp_path, native_threads):
    """`async with rig_maker(...) as rig`: over each data path."""

    def make(**arguments):
        return make_rig(tmp_path, threads=native_threads, **arguments)

    return make


@pytest.fixture
def python_rig_maker(tmp_path):
    """Over the data path in Python, to look into it."""

    def make(**arguments):
        return make_rig(tmp_path, **arguments)

    return make
