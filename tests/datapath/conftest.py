"""A disk served over real shared memory to a frontend, with no XenStore between them."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from xbd.core.datapath import Disk, Features, FrontendConfig, GrantMode, QueueConfig
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

DEVID = 51712
NAME = "xbdback1i51712"


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
        await self.disk.connect(self.nursery, self.config())


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
        disk = Disk(
            access,
            name=NAME,
            devid=DEVID,
            read_only=read_only,
            features=features,
            hypervisor=host.hypervisor,
            grants=grants,
            journal_dir=journal_dir,
            budget=budget,
        )
        front = DiskRequests(guest, options)
        await front.make_queues(options.queues, options.ring_order)
        front.make_data_pages(features.max_indirect_segments)
        rig = Rig(host, guest, disk, front, device, access, nursery)
        await rig.connect()
        nursery.start_soon(front.run_queues)
        yield rig
        await disk.disconnect(drain=True)
        assert host.hypervisor.mapped_pages == 0
        assert host.hypervisor.bound_ports == 0
        nursery.cancel_scope.cancel()
        front.release()


@pytest.fixture
def rig_maker(tmp_path):
    """`async with rig_maker(...) as rig`."""

    def make(**arguments):
        return make_rig(tmp_path, **arguments)

    return make
