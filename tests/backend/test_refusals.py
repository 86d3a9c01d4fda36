"""Disks that can't be opened: the toolstack hears why, and nobody else notices."""

from __future__ import annotations

import pytest
import trio
from backend_world import BASE, Frontend

from xbd.core.backend.policy import Limits
from xbd.core.blkif.state import XenbusState

INIT_WAIT = XenbusState.INIT_WAIT
CLOSED = XenbusState.CLOSED


@pytest.fixture
async def neighbour(world):
    """A guest with a disk that works, before and after whatever the test does."""
    await world.start()
    async with world.guest() as domain:
        attachment = await world.attach(domain.domid, f"imagefile:{world.image('good.img')}")
        frontend = Frontend(attachment, domain)
        await frontend.connect()
        yield frontend
        await frontend.write_sector(0, b"n" * 512)
        assert len(world.said("connect identifier")) >= 1
        assert await attachment.key("state") == "4"


REFUSED = [
    ("nonsense:/x", "no driver"),
    ("imagefile:{there}?colour=red", "colour"),
    ("imagefile:{there}?cache=maybe", "cache"),
    ("imagefile:{there}?cache=none&cache=none", "given twice"),
    ("imagefile:/absent/disk.img", "No such file"),
    ("imagefile:{directory}", "directory"),
    ("imagefile:relative.img", "relative.img"),
    ("imagefile:%zz", "'%'"),
    ("imagefile:", "no path"),
    ("imagefile", "DRIVER:PATH"),
    ("", "DRIVER:PATH"),
    (":/x", "names no driver"),
    ("IMAGE FILE:/x", "driver's name"),
    ("imagefile:{empty}", "empty"),
    ("imagefile:/x\n/y", "control character"),
]


@pytest.mark.parametrize(("disk", "expected"), REFUSED)
async def test_the_reason_reaches_the_toolstack(world, neighbour, disk, expected):
    text = disk.format(
        there=world.image(), empty=world.image("empty.img", 0), directory=world.directory
    )
    attachment = await world.attach(7, text, connected=False)
    await attachment.until_state(INIT_WAIT)
    line = await attachment.key("xbd-error")
    assert await attachment.key("xbd-status") == "error"
    assert expected.lower() in line.lower()
    assert "\n" not in line
    number, _, rest = (await attachment.error_node()).partition(" ")
    assert number.isdigit()
    assert rest == line
    assert any(line[:60] in said for said in world.said(""))
    # What libxl does then: the script fails, the attach is undone.
    await attachment.set("hotplug-error", line)
    await attachment.set("hotplug-status", "error")
    await attachment.order_detach()
    await attachment.until_state(CLOSED)
    await attachment.remove()
    await world.until_gone(attachment)
    assert await world.store.directory(f"{BASE}/error/backend") is None


async def test_an_image_in_use_says_so(world, neighbour):
    attachment = await world.attach(7, f"imagefile:{world.directory}/good.img")
    await attachment.until_state(INIT_WAIT)
    line = await attachment.key("xbd-error")
    assert "good.img" in line
    assert "busy" in line
    assert (await attachment.error_node()).startswith("16 ")
    assert world.said("errno 16, EBUSY")


async def test_a_guest_of_a_refused_disk_is_told_to_close(world, neighbour):
    attachment = await world.attach(neighbour.domain.domid, "imagefile:/absent", devid=51728)
    await attachment.until_state(INIT_WAIT)
    await Frontend(attachment, neighbour.domain).state(XenbusState.INITIALISED)
    await attachment.until_state(XenbusState.CLOSING)
    await Frontend(attachment, neighbour.domain).state(CLOSED)
    await attachment.until_state(CLOSED)


async def test_attached_again_after_the_mistake_was_mended(world, neighbour):
    path = world.directory / "late.img"
    attachment = await world.attach(7, f"imagefile:{path}")
    await attachment.until_state(INIT_WAIT)
    assert await attachment.key("xbd-status") == "error"
    await attachment.order_detach()
    await attachment.until_state(CLOSED)
    await attachment.remove()
    world.image("late.img")
    await attachment.write(f"imagefile:{path}")
    await world.until(f"{attachment.path}/xbd-status", lambda v: v == "open", "open")
    assert await attachment.key("xbd-error") is None
    assert await attachment.error_node() is None


async def test_a_domain_can_only_have_so_many_disks(world):
    await world.start(limits=Limits(disks_per_domain=2, frontend_seconds=0.05))
    attachments = [
        await world.attach(9, f"imagefile:{world.image(f'{n}.img')}", devid=51712 + 16 * n)
        for n in range(3)
    ]
    for attachment in attachments:
        await attachment.until_state(INIT_WAIT)
    statuses = [await attachment.key("xbd-status") for attachment in attachments]
    assert sorted(statuses) == ["error", "open", "open"]
    refused = attachments[statuses.index("error")]
    assert "limits.disks_per_domain" in await refused.key("xbd-error")
    elsewhere = await world.attach(10, f"imagefile:{world.image('other.img')}")
    await elsewhere.until_state(INIT_WAIT)
    assert await elsewhere.key("xbd-status") == "open"


async def test_secrets_stay_out_of_errors(world, neighbour):
    attachment = await world.attach(7, f"imagefile:{world.image()}?password=hunter2")
    await attachment.until_state(INIT_WAIT)
    assert "hunter2" not in await attachment.key("xbd-error")
    assert not world.said("hunter2")


async def test_a_slow_refusal_does_not_come_after_the_toolstack_gave_up(world):
    await world.start()
    attachment = await world.attach(7, "imagefile:/absent")
    await attachment.order_detach()
    await attachment.until_state(CLOSED)
    await trio.testing.wait_all_tasks_blocked(0.02)
    assert await attachment.key("state") == "6"


async def test_a_guest_cannot_make_us_try_to_open_for_ever(world):
    """The image disappears while the guest has closed the disk, and the guest begins anew."""
    await world.start(limits=Limits(failures=3, frontend_seconds=0.05))
    image = world.image()
    async with world.guest() as domain:
        attachment = await world.attach(domain.domid, f"imagefile:{image}")
        frontend = Frontend(attachment, domain)
        await frontend.connect()
        await frontend.state(CLOSED)
        await attachment.until_state(CLOSED)
        await world.stop()
        image.unlink()
        await frontend.state(XenbusState.INITIALISING)
        await world.start()
        with trio.fail_after(10):
            while not world.said("failed more than 3 times"):
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert await attachment.key("state") == "6"
        assert len(world.said("No such file")) == 4
