"""Which directories are ours, and what a supervisor does when its world changes."""

from __future__ import annotations

import pytest
import trio
from backend_world import BASE, MIB, Frontend

from xbd.core.backend.device import Services
from xbd.core.backend.failure import worst
from xbd.core.backend.keys import OwnKeys
from xbd.core.backend.supervisor import Supervisor, is_ours
from xbd.core.blkif.state import XenbusState
from xbd.core.errors import HypervisorLost
from xbd.core.hypervisor.embedded import EmbeddedHypervisor
from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient

INIT_WAIT = XenbusState.INIT_WAIT


def own(script="", params=""):
    return OwnKeys(
        frontend="/f",
        frontend_id=Domid(1),
        state=XenbusState.INITIALISING,
        online=True,
        params=params,
        mode="w",
        dev="xvda",
        device_type="disk",
        script=script,
        removable=False,
        discard_enable=True,
        direct_io_safe=False,
        hotplug_status="",
        physical_device_path="",
    )


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        ("vbd3", {"script": "/etc/xen/scripts/block-xbd"}, True),
        ("vbd3", {"script": "block-xbd"}, True),
        ("vbd3", {"script": "/etc/xen/scripts/block-tap", "params": "aio:/dev/x"}, False),
        ("vbd3", {"params": "aio:qcow2:/x.qcow2"}, True),
        ("vbd3", {"params": "vhd:/x.vhd"}, False),
        ("vbd3", {"params": ""}, False),
        ("vbd", {"script": "/etc/xen/scripts/block", "params": "/dev/vg/lv"}, False),
        ("vbd", {"script": "/etc/xen/scripts/block-xbd", "params": "raw:/dev/vg/lv"}, True),
        ("vbd", {"params": "aio:qcow2:/x"}, False),
        ("qdisk", {"params": "aio:/x"}, False),
        ("xbd", {"params": "raw:/x"}, True),
    ],
)
def test_what_is_ours(kind, keys, expected):
    assert is_ours(kind, own(**keys)) is expected


async def test_others_disks_are_left_alone(world):
    await world.start("vbd3", "vbd")
    image = world.image()
    tap = await world.attach(3, f"{image}", script="/etc/xen/scripts/block-tap")
    kernel = await world.attach(3, f"{image}", kind="vbd", script="/etc/xen/scripts/block")
    ours = await world.attach(3, f"imagefile:{image}", kind="vbd", devid=51728)
    await ours.until_state(INIT_WAIT)
    assert await tap.key("state") == "1"
    assert await kernel.key("state") == "1"
    assert set(world.supervisor.devices) == {ours.id}


async def test_nonsense_in_the_tree_is_left_alone(world):
    for path in ("x/1", "1/x", "01/51712", "40000/51712", "1", "1/99999999999", "2/5/deep/er"):
        await world.store.write(f"{BASE}/backend/vbd3/{path}/state", "1")
    await world.start()
    attachment = await world.attach(3, f"imagefile:{world.image()}")
    await attachment.until_state(INIT_WAIT)
    assert set(world.supervisor.devices) == {attachment.id}


async def test_a_directory_that_names_another_domain_is_not_served(world):
    await world.start()
    attachment = await world.attach(3, f"imagefile:{world.image()}", extra={"frontend-id": 4})
    other = await world.attach(5, f"imagefile:{world.directory}/disk.img")
    await other.until_state(INIT_WAIT)
    assert await attachment.key("state") == "1"
    assert world.said("frontend-id")


async def test_a_key_that_comes_late_makes_it_ours(world):
    await world.start()
    attachment = await world.attach(3, f"imagefile:{world.image()}", extra={"state": None})
    await attachment.set("state", 1)
    await attachment.until_state(INIT_WAIT)


async def test_the_connection_to_xenstore_breaks(world):
    await world.start()
    async with world.guest() as domain:
        attachment = await world.attach(domain.domid, f"imagefile:{world.image()}")
        frontend = Frontend(attachment, domain)
        await frontend.connect()
        generation = world.store.generation
        world.store._link.lose("a test cut it")
        await frontend.write_sector(0, b"l" * 512)
        late = await world.attach(domain.domid, f"imagefile:{world.image('2.img')}", devid=51728)
        await late.until_state(INIT_WAIT)
        assert world.store.generation > generation
        assert await attachment.key("state") == "4"
        assert len(world.said("connect identifier")) == 1
        await frontend.state(XenbusState.CLOSING)
        await attachment.until_state(XenbusState.CLOSING)


async def test_the_connection_breaks_at_every_attach(world):
    """Wherever a device's task is when the connection breaks, it starts again from there."""
    ours = world.store
    await world.start()
    async with StoreClient.connect(world.server.path) as toolstack:
        world.store = toolstack
        attachments = []
        for number in range(4):
            image = world.image(f"{number}.img")
            attachments.append(await world.attach(3, f"imagefile:{image}", devid=number))
            for _ in range(number):
                await trio.lowlevel.checkpoint()
            ours._link.lose("a test cut it")
        for attachment in attachments:
            await attachment.until_state(INIT_WAIT)
            assert await attachment.key("xbd-status") == "open"
        world.store = ours


async def test_a_disk_of_each_of_many_guests(world):
    await world.start()
    attachments = [
        await world.attach(domid, f"imagefile:{world.image(f'{domid}.img', MIB)}")
        for domid in range(1, 21)
    ]
    for attachment in attachments:
        await attachment.until_state(INIT_WAIT)
    await world.store.remove(f"{BASE}/backend/vbd3")
    for attachment in attachments:
        await world.until_gone(attachment)
    assert not world.supervisor.devices


class LostHypervisor(EmbeddedHypervisor):
    """One whose device file has died."""

    def map_grants(self, domid, refs, *, writable):
        raise HypervisorLost("the grant device does not answer any more")


async def test_only_the_loss_of_the_hypervisor_ends_everything(world):
    services = Services(
        store=world.store, base=BASE, hypervisor=LostHypervisor(), policy=world.policy
    )
    supervisor = Supervisor(services, ["vbd3"])
    with trio.fail_after(10):
        async with world.guest() as domain:
            attachment = await world.attach(domain.domid, f"imagefile:{world.image()}")
            frontend = Frontend(attachment, domain)
            await frontend.make_ring()
            await frontend.publish()
            with pytest.raises(BaseException) as caught:  # noqa: PT011
                await supervisor.run()
    assert isinstance(worst(caught.value), HypervisorLost)
