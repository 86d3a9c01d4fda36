"""A device's life, scenario by scenario: attach, connect, close, hand over, vanish, die."""

from __future__ import annotations

import pytest
import trio
from backend_world import BASE, MIB, Frontend
from data_paths import NATIVE, PYTHON

from xbd.core.backend.policy import Limits, OnStop
from xbd.core.blkif import constants
from xbd.core.blkif.state import XenbusState

pytestmark = pytest.mark.parametrize("threads", [PYTHON, NATIVE], indirect=True)

INITIALISING = XenbusState.INITIALISING
INIT_WAIT = XenbusState.INIT_WAIT
INITIALISED = XenbusState.INITIALISED
CONNECTED = XenbusState.CONNECTED
CLOSING = XenbusState.CLOSING
CLOSED = XenbusState.CLOSED


@pytest.fixture
async def guest(world):
    async with world.guest() as domain:
        yield domain


@pytest.fixture
async def attached(world, guest):
    """An attached disk and its frontend, not connected yet."""
    await world.start()
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}")
    return attachment, Frontend(attachment, guest)


# -- attach and connect ---------------------------------------------------------------------


async def test_a_disk_is_attached_connected_and_works(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    await frontend.write_sector(5, b"x" * 512)
    assert await frontend.read_sector(5) == b"x" * 512
    assert (world.directory / "disk.img").read_bytes()[5 * 512 : 6 * 512] == b"x" * 512
    assert await attachment.key("xbd-status") == "open"


async def test_everything_is_published_before_init_wait(world, attached):
    attachment, _ = attached
    await attachment.until_state(INIT_WAIT)
    keys = {
        name: await attachment.key(name) for name in await world.store.directory(attachment.path)
    }
    assert keys["sectors"] == str(MIB // 512)
    assert keys["sector-size"] == "512"
    assert keys["info"] == "0"
    assert keys["feature-flush-cache"] == "1"
    assert keys["feature-barrier"] == "1"
    assert keys["feature-max-indirect-segments"] == "256"
    assert keys["max-ring-page-order"] == "4"
    assert keys["max-ring-pages"] == "16"
    assert keys["multi-queue-max-queues"] == "4"
    assert keys["feature-persistent"] == "1"
    assert "physical-sector-size" in keys


async def test_init_wait_is_held_until_the_script_has_run(world, guest):
    await world.start()
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}", connected=False)
    frontend = Frontend(attachment, guest)
    await attachment.until_state(INIT_WAIT)
    await frontend.make_ring()
    await frontend.publish()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert await attachment.key("state") == "2"
    await attachment.set("hotplug-status", "connected")
    await attachment.until_state(CONNECTED)


async def test_physical_device_path_ends_the_hold_too(world, guest):
    await world.start()
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}", connected=False)
    frontend = Frontend(attachment, guest)
    await attachment.until_state(INIT_WAIT)
    await frontend.make_ring()
    await frontend.publish()
    await attachment.set("physical-device-path", "/run/xbd/nbd")
    await attachment.until_state(CONNECTED)


async def test_a_kind_without_a_script_needs_none(world, guest):
    await world.start("xbd")
    disk = f"imagefile:{world.image()}"
    attachment = await world.attach(
        guest.domid, disk, kind="xbd", script=None, connected=False, extra={"params": disk}
    )
    await Frontend(attachment, guest).connect()


async def test_a_frontend_may_come_as_connected_at_once(world, attached):
    attachment, frontend = attached
    await attachment.until_state(INIT_WAIT)
    await frontend.make_ring()
    await frontend.publish(CONNECTED)
    await attachment.until_state(CONNECTED)
    await frontend.write_sector(0, b"y" * 512)


async def test_a_daemon_that_starts_late_finds_guests_waiting(world, guest):
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}")
    frontend = Frontend(attachment, guest)
    await frontend.make_ring()
    await frontend.publish()
    await world.start()
    await attachment.until_state(CONNECTED)
    await frontend.write_sector(1, b"z" * 512)


async def test_a_ring_of_several_pages(world, attached):
    _, frontend = attached
    await frontend.connect(order=3)
    await frontend.write_sector(0, b"r" * 512)
    assert await frontend.read_sector(0) == b"r" * 512


async def test_a_read_only_disk_refuses_writes(world, guest):
    await world.start()
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}", mode="r")
    frontend = Frontend(attachment, guest)
    await frontend.connect()
    assert await attachment.key("info") == "4"
    assert await attachment.key("feature-discard") == "0"
    assert await frontend.rw(constants.WRITE) == constants.RSP_ERROR
    assert await frontend.rw(constants.READ) == constants.RSP_OKAY


async def test_the_toolstack_can_switch_discard_off(world, guest):
    await world.start()
    extra = {"discard-enable": 0}
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}", extra=extra)
    await attachment.until_state(INIT_WAIT)
    assert await attachment.key("feature-discard") == "0"


async def test_the_three_diagnostics(world, attached):
    _, frontend = attached
    await frontend.connect()
    image = world.directory / "disk.img"
    assert world.said(f"attach device imagefile:{image} (size 2048 sectors of 512 bytes)")
    (line,) = world.said("connect identifier 51712 (xvda)")
    assert f"domain {frontend.domain.domid} " in line
    assert f"event channel {frontend.port.port}," in line
    assert "protocol x86_64-abi" in line


# -- the guest closes -----------------------------------------------------------------------


async def test_close_and_detach(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    await frontend.state(CLOSING)
    await attachment.until_state(CLOSING)
    assert world.host.hypervisor.mapped_pages == 0
    assert world.host.hypervisor.bound_ports == 0
    await frontend.state(CLOSED)
    await attachment.until_state(CLOSED)
    await attachment.order_detach()
    await attachment.until_state(CLOSED)
    await attachment.remove()
    await world.until_gone(attachment)


async def test_kexec_hands_the_disk_to_the_next_kernel(world, attached):
    attachment, frontend = attached
    for round_ in range(3):
        await frontend.connect()
        await frontend.write_sector(round_, b"k" * 512)
        for theirs in (CLOSING, CLOSED):
            await frontend.state(theirs)
            await attachment.until_state(theirs)
        frontend.drop_ring()
        await frontend.state(INITIALISING)
        await attachment.until_state(INIT_WAIT)
    assert len(world.said("attach device")) == 1, "the disk stayed open all the time"


async def test_kexec_whose_events_come_all_at_once(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    frontend.drop_ring()
    await frontend.state(INITIALISING)
    await attachment.until_state(INIT_WAIT)
    await frontend.connect()
    await frontend.write_sector(0, b"k" * 512)


async def test_closed_at_once_without_closing(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    await frontend.state(CLOSED)
    await attachment.until_state(CLOSED)
    assert world.host.hypervisor.mapped_pages == 0


async def test_requests_in_flight_are_answered_before_closing(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    sent = {frontend.submit(constants.WRITE, n) for n in range(20)}
    await frontend.state(CLOSING)
    await attachment.until_state(CLOSING)
    answered = {number for number, _, status in frontend.ring.responses() if status == 0}
    assert answered <= sent
    assert len(answered) in (0, len(sent)) or answered


# -- new keys without closing ---------------------------------------------------------------


async def test_resume_with_new_keys(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    frontend.drop_ring()
    await frontend.make_ring()
    async with world.store.watch(f"{attachment.path}/state") as watch:
        await watch.changed()
        await frontend.publish()
        with trio.fail_after(5):
            await watch.changed()  # the guest waits for an event, not only for the value
    assert len(world.said("connect identifier")) == 2
    assert await attachment.key("state") == "4"
    await frontend.write_sector(3, b"s" * 512)


async def test_a_cancelled_suspend_changes_nothing(world, attached):
    _, frontend = attached
    await frontend.connect()
    await frontend.state(CONNECTED)
    await frontend.state(INITIALISED)
    await trio.testing.wait_all_tasks_blocked(0.05)
    await frontend.state(CONNECTED)
    await frontend.write_sector(3, b"c" * 512)
    assert len(world.said("connect identifier")) == 1


async def test_a_connected_guest_that_scribbles_over_its_keys(world, attached):
    _, frontend = attached
    await frontend.connect()
    await frontend.state(CONNECTED)
    await frontend.write(ring_ref="garbage")
    await frontend.state(CONNECTED)  # have it looked at
    await trio.testing.wait_all_tasks_blocked(0.05)
    await frontend.write_sector(3, b"c" * 512)


async def test_a_flood_of_states_is_few_looks(world, attached):
    _, frontend = attached
    await frontend.connect()
    for _ in range(300):
        await frontend.state(CONNECTED)
        await frontend.write(junk="x")
    await frontend.write_sector(0, b"f" * 512)
    assert len(world.said("connect identifier")) == 1
    for number in (7, 8, 99, 4294967296, -1, "four", ""):
        await frontend.write(state=number)
    await frontend.state(CONNECTED)
    await frontend.write_sector(0, b"g" * 512)


# -- the toolstack --------------------------------------------------------------------------


async def test_detach_while_connected_waits_for_the_guest(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    await attachment.order_detach()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert await attachment.key("state") == "5"
    await frontend.write_sector(9, b"last words".ljust(512))
    await frontend.state(CLOSING)
    await frontend.state(CLOSED)
    await attachment.until_state(CLOSED)
    await attachment.remove()
    await world.until_gone(attachment)


async def test_detach_before_anybody_connected(world, attached):
    attachment, _ = attached
    await attachment.until_state(INIT_WAIT)
    await attachment.order_detach()
    await attachment.until_state(CLOSED)


async def test_the_image_is_free_when_the_toolstack_sees_closed(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    await attachment.order_detach()
    await frontend.state(CLOSED)
    await attachment.until_state(CLOSED)
    other = await world.attach(7, f"imagefile:{world.directory}/disk.img")
    await other.until_state(INIT_WAIT)
    assert await other.key("xbd-status") == "open"


async def test_forced_detach_removes_the_frontend_first(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    await attachment.order_detach()
    await world.store.remove(attachment.frontend)
    await attachment.until_state(CLOSED)
    assert world.host.hypervisor.mapped_pages == 0


async def test_a_vanished_directory_drops_everything(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    await world.store.remove(attachment.path)
    await world.until_gone(attachment)
    assert world.host.hypervisor.mapped_pages == 0
    assert world.host.hypervisor.bound_ports == 0
    assert await world.store.directory(attachment.path) is None, "it must not be made again"


async def test_removed_and_attached_again_at_once(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    other = world.image("other.img", 2 * MIB)
    await attachment.remove()
    await attachment.write(f"imagefile:{other}")
    await attachment.until_state(INIT_WAIT)
    assert await attachment.key("sectors") == str(2 * MIB // 512)
    frontend.drop_ring()
    await frontend.connect()


async def test_detach_that_began_while_no_daemon_ran(world, guest):
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}")
    await attachment.order_detach()
    await world.start()
    await attachment.until_state(CLOSED)


async def test_a_guest_that_dies_is_cleaned_up_after(world):
    await world.start()
    async with world.guest() as domain:
        attachment = await world.attach(domain.domid, f"imagefile:{world.image()}")
        frontend = Frontend(attachment, domain)
        await frontend.connect()
    await world.store.remove(f"/local/domain/{domain.domid}")
    await attachment.until_state(CLOSED)
    assert world.host.hypervisor.mapped_pages == 0
    await world.store.remove(f"{BASE}/backend/vbd3/{domain.domid}")
    await world.until_gone(attachment)


# -- isolation ------------------------------------------------------------------------------


async def test_a_corrupt_ring_closes_its_device_alone(world, attached):
    attachment, frontend = attached
    await frontend.connect()
    neighbour = await world.attach(
        frontend.domain.domid, f"imagefile:{world.image('two.img')}", devid=51728
    )
    other = Frontend(neighbour, frontend.domain)
    await other.connect()
    frontend.domain.page(frontend.refs[0])[0:4] = (0x1000).to_bytes(4, "little")
    frontend.port.notify()
    await attachment.until_state(CLOSING)
    assert "ring" in await attachment.key("xbd-error")
    assert await attachment.error_node()
    await other.write_sector(0, b"n" * 512)
    await frontend.state(CLOSED)
    await attachment.until_state(CLOSED)
    frontend.drop_ring()
    await frontend.state(INITIALISING)
    await attachment.until_state(INIT_WAIT)
    await frontend.connect()
    await frontend.write_sector(0, b"a" * 512)
    assert await attachment.error_node() is None


async def test_a_device_that_keeps_failing_stays_closed(world, guest):
    await world.start(limits=Limits(failures=2, frontend_seconds=0.05))
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}")
    frontend = Frontend(attachment, guest)
    for _ in range(3):
        await attachment.until_state(INIT_WAIT)
        await frontend.write(ring_ref="nonsense", event_channel=1)
        await frontend.state(INITIALISED)
        await attachment.until_state(CLOSING)
        await frontend.state(CLOSED)
        await attachment.until_state(CLOSED)
        await frontend.state(INITIALISING)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert await attachment.key("state") == "6"
    assert world.said("failed more than 2 times")
    await attachment.remove()
    await attachment.write(f"imagefile:{world.directory}/disk.img")
    await attachment.until_state(INIT_WAIT)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"ring_ref": "x"}, "ring-ref is 'x', not a number"),
        ({"ring_ref": None}, "ring-ref is missing"),
        ({"event_channel": None}, "event-channel is missing"),
        ({"event_channel": 99999}, ""),
        ({"ring_ref": 200}, ""),
        ({"protocol": "x86_128-abi"}, "unknown protocol"),
        ({"ring_page_order": 9}, "ring-page-order is 9, offered was 4"),
        ({"multi_queue_num_queues": 0}, "multi-queue-num-queues is 0, offered were 1 to 4"),
        ({"multi_queue_num_queues": 5}, "multi-queue-num-queues is 5"),
    ],
)
async def test_bad_negotiation_closes_the_device_with_a_clear_line(world, attached, keys, expected):
    attachment, frontend = attached
    await attachment.until_state(INIT_WAIT)
    await frontend.make_ring()
    await frontend.publish(INITIALISING)
    for name, value in keys.items():
        if value is None:
            await frontend.remove(name.replace("_", "-"))
        else:
            await frontend.write(**{name: value})
    await frontend.state(INITIALISED)
    await attachment.until_state(CLOSING)
    error = await attachment.key("xbd-error")
    assert expected in error
    assert "\n" not in error
    assert (await attachment.error_node()).endswith(error)


# -- the daemon stops -----------------------------------------------------------------------


async def test_stop_closes_disks_with_their_guests(world, guest):
    await world.start(limits=Limits())
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}")
    frontend = Frontend(attachment, guest)
    await frontend.connect()

    async def behave():
        await attachment.until_state(CLOSING)
        await frontend.write_sector(8, b"w" * 512)
        await frontend.state(CLOSING)
        await frontend.state(CLOSED)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(behave)
        await world.stop()
    assert await attachment.key("state") == "6"
    assert (world.directory / "disk.img").read_bytes()[8 * 512 : 9 * 512] == b"w" * 512


async def test_stop_does_not_wait_for_ever(world, guest):
    await world.start(limits=Limits(frontend_seconds=0.1))
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}")
    await Frontend(attachment, guest).connect()
    await world.stop()
    assert await attachment.key("state") == "6"


async def test_a_disk_can_be_kept_for_the_next_daemon(world, guest):
    await world.start(on_stop=OnStop.KEEP)
    attachment = await world.attach(guest.domid, f"imagefile:{world.image()}")
    frontend = Frontend(attachment, guest)
    await frontend.connect()
    for number in range(40):
        await frontend.write_sector(number, bytes([number]) * 512)
    await world.stop()
    assert await attachment.key("state") == "4"
    assert world.host.hypervisor.mapped_pages == 0
    request = frontend.submit(constants.READ, 17)
    await world.start(on_stop=OnStop.KEEP)
    assert await frontend.answer() == [(request, constants.READ, 0)]
    assert bytes(frontend.domain.page(frontend.data)[:512]) == bytes([17]) * 512


async def test_a_daemon_stopped_while_disks_wait_leaves_them_waiting(world, attached):
    attachment, frontend = attached
    await attachment.until_state(INIT_WAIT)
    await world.stop()
    assert await attachment.key("state") == "2"
    await world.start()
    await frontend.connect()
