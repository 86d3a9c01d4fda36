"""The socket from which QEMU emulates an HVM guest's disk until the guest's own drivers run."""

from __future__ import annotations

import shutil
import stat
import subprocess

import pytest
import trio
import trio.testing
from backend_world import BASE, SECONDS, XVDA, Frontend

from xbd.core.backend.identity import DeviceId
from xbd.core.backend.node import Node
from xbd.core.backend.orders import carry_out
from xbd.core.backend.policy import OnStop
from xbd.core.blkif import constants
from xbd.core.blkif.state import XenbusState
from xbd.core.errors import ConfigError, DeviceBroken
from xbd.core.nbd import server
from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient

INIT_WAIT = XenbusState.INIT_WAIT
CLOSED = XenbusState.CLOSED
GREETING = b"NBDMAGICIHAVEOPT"


@pytest.fixture
async def guest(world):
    async with world.guest() as domain:
        yield domain


@pytest.fixture
def sockets(world):
    path = world.directory / "nbd"
    path.mkdir()
    return path


async def attach(world, guest, *, type_="hvm", **options):
    """A disk of a guest that libxl has made as one of this type."""
    if type_ is not None:
        await world.store.write(f"/libxl/{guest.domid}/type", type_)
    disk = options.pop("disk", None) or f"imagefile:{world.image()}"
    attachment = await world.attach(guest.domid, disk, connected=False, **options)
    await attachment.until_state(INIT_WAIT)
    return attachment


async def run_the_script(attachment):
    """What block-xbd does when libxl has seen InitWait."""
    assert await attachment.key("xbd-status") == "open"
    path = await attachment.key("xbd-nbd")
    if path is not None:
        await attachment.set("physical-device-path", path)
    await attachment.set("hotplug-status", "connected")
    return path


async def qemu_io(path, *commands, read_only=False):
    """QEMU, as the guest's device model opens the disk; what it said, and whether all went well."""
    if shutil.which("qemu-io") is None:
        pytest.skip("needs qemu-io")
    words = [word for command in commands for word in ("-c", command)]
    uri = f"nbd+unix:///?socket={path}"
    with trio.fail_after(SECONDS):
        done = await trio.run_process(
            ["qemu-io", "-f", "raw", *(["-r"] if read_only else []), *words, uri],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return done.returncode == 0 and b"failed" not in done.stdout, done.stdout.decode()


async def greeting(stream):
    with trio.fail_after(SECONDS):
        received = b""
        while len(received) < 18:
            received += await stream.receive_some(18 - len(received))
    return received[:16]


# -- which disks ----------------------------------------------------------------------------


async def test_an_hvm_guests_disk_is_there_for_qemu_and_then_for_its_own_drivers(
    world, guest, sockets
):
    await world.start(nbd_dir=sockets)
    attachment = await attach(world, guest)
    path = await run_the_script(attachment)
    assert path == str(sockets / attachment.id.name)
    good, said = await qemu_io(path, "write -P 65 0 4k", "flush", "read -P 65 0 4k")
    assert good, said
    frontend = Frontend(attachment, guest)
    await frontend.connect()
    assert await frontend.read_sector(7) == b"A" * 512
    await frontend.write_sector(7, b"B" * 512)
    good, said = await qemu_io(path, "read -P 65 0 3584", "read -P 66 3584 512")
    assert good, said


@pytest.mark.parametrize("type_", ["pv", "pvh", None])
async def test_other_guests_need_none(world, guest, sockets, type_):
    await world.start(nbd_dir=sockets)
    attachment = await attach(world, guest, type_=type_)
    assert await run_the_script(attachment) is None
    assert list(sockets.iterdir()) == []


async def test_a_driver_domain_is_not_told_the_type_of_guests(world):
    await world.store.write("/libxl/7/type", "hvm")
    world.server.introduce(9)
    async with StoreClient.connect(world.server.path_for(Domid(9))) as store:
        device = DeviceId("vbd3", Domid(7), XVDA)
        assert not await Node(store, "/local/domain/9", device).is_hvm()
        assert await Node(world.store, BASE, device).is_hvm()


async def test_none_without_a_directory_for_them(world, guest):
    await world.start(nbd_dir=None)
    attachment = await attach(world, guest)
    assert await run_the_script(attachment) is None


async def test_none_where_libxl_would_take_the_socket_for_an_image(world, guest, sockets):
    await world.start("vbd", nbd_dir=sockets)
    attachment = await attach(world, guest, kind="vbd")
    assert await run_the_script(attachment) is None


@pytest.mark.parametrize(("dev", "emulated"), [("xvda", False), ("hda", False), ("sda", True)])
async def test_read_only_disks_only_where_libxl_allows_it(world, guest, sockets, dev, emulated):
    await world.start(nbd_dir=sockets)
    attachment = await attach(world, guest, mode="r", extra={"dev": dev})
    path = await run_the_script(attachment)
    assert (path is not None) == emulated
    if emulated:
        good, said = await qemu_io(path, "read -P 0 0 64k", read_only=True)
        assert good, said
        good, _ = await qemu_io(path, "write -P 1 0 4k")
        assert not good
        assert not any((world.directory / "disk.img").read_bytes())


# -- how long -------------------------------------------------------------------------------


async def test_nobody_else_may_connect(world, guest, sockets):
    await world.start(nbd_dir=sockets)
    path = await run_the_script(await attach(world, guest))
    assert stat.S_IMODE((await trio.Path(path).stat()).st_mode) == 0o600


async def test_it_ends_with_the_disk_even_if_qemu_stays(world, guest, sockets):
    await world.start(nbd_dir=sockets)
    attachment = await attach(world, guest)
    path = await run_the_script(attachment)
    async with await trio.open_unix_socket(path) as stream:
        assert await greeting(stream) == GREETING
        await attachment.order_detach()
        await attachment.until_state(CLOSED)
        with trio.fail_after(SECONDS):
            assert await stream.receive_some() == b""
    assert list(sockets.iterdir()) == []
    other = await world.attach(7, f"imagefile:{world.directory}/disk.img", devid=XVDA + 16)
    await other.until_state(INIT_WAIT)
    assert await other.key("xbd-status") == "open"  # so the image was let go


async def test_what_qemu_uses_is_not_paused(world, guest, sockets):
    await world.start(nbd_dir=sockets)
    attachment = await attach(world, guest)
    path = await run_the_script(attachment)

    async def order(name):
        devices = world.supervisor.devices.values()
        return await carry_out(name, devices, {"disk": attachment.id.name})

    async with await trio.open_unix_socket(path) as stream:
        assert await greeting(stream) == GREETING
        # Client flags, and the option NBD_OPT_EXPORT_NAME with the empty name.
        await stream.send_all(bytes(4) + b"IHAVEOPT" + (1).to_bytes(4, "big") + bytes(4))
        with trio.fail_after(SECONDS):
            await stream.receive_some()
        with pytest.raises(ConfigError, match="in use by the guest's QEMU"):
            await order("pause")
    with trio.fail_after(SECONDS):
        while world.device(attachment).emulating:
            await trio.testing.wait_all_tasks_blocked(0.005)
    assert await order("pause") == f"paused {attachment.id.name}"
    frontend = Frontend(attachment, guest)
    await frontend.connect()
    frontend.submit(constants.READ, 0)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert world.device(attachment).disk.connection.in_flight == 0
    assert await order("resume") == f"resumed {attachment.id.name}"
    await frontend.answer()


async def test_the_next_daemon_serves_it_at_the_same_place(world, guest, sockets):
    await world.start(nbd_dir=sockets, on_stop=OnStop.KEEP)
    attachment = await attach(world, guest)
    path = await run_the_script(attachment)
    frontend = Frontend(attachment, guest)
    await frontend.connect()
    await world.stop()
    assert list(sockets.iterdir()) == []
    await world.start(nbd_dir=sockets, on_stop=OnStop.KEEP)
    await frontend.write_sector(0, b"C" * 512)
    good, said = await qemu_io(path, "read -P 67 0 512")
    assert good, said


# -- what goes wrong ------------------------------------------------------------------------


async def test_without_a_usable_directory_the_guests_own_drivers_still_find_it(world, guest):
    await world.start(nbd_dir=world.directory / "absent")
    attachment = await attach(world, guest)
    assert await run_the_script(attachment) is None
    await Frontend(attachment, guest).connect()
    (line,) = world.said("no emulated disk")
    assert "cannot listen on" in line


async def test_a_failure_of_the_nbd_server_is_not_the_rings(world, guest, sockets, monkeypatch):
    def out_of_memory(_poller):
        raise DeviceBroken("out of memory")

    monkeypatch.setattr(server, "make_engine", out_of_memory)
    await world.start(nbd_dir=sockets)
    attachment = await attach(world, guest)
    await run_the_script(attachment)
    frontend = Frontend(attachment, guest)
    await frontend.connect()
    assert world.said("no emulated disk, only the guest's own drivers find it: out of memory")
    await frontend.write_sector(1, b"D" * 512)
    assert await frontend.read_sector(1) == b"D" * 512
    assert await world.store.read(f"{BASE}/error/{attachment.id.node}/error") is None
