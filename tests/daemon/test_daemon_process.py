"""The daemon as a process: it starts, serves, stops, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import socket

import pytest
import trio
from daemon_process import DOMID, SECONDS, disk_of, guest_with, run, running, starter
from sample_packages import CHUNKS, install

from xbd.core.control.client import ask
from xbd.core.datapath import native
from xbd.core.frontend.toolstack import AttachFailed, DiskLine, Toolstack
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.xenstore.client import StoreClient

MIB = 1 << 20


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "host"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


async def test_serve_a_disk_list_it_and_stop(directory, image):
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        line = DiskLine(target=f"imagefile:{image}")
        async with guest_with(directory, line) as (toolstack, _, guest):
            async with disk_of(directory, guest, line) as disk:
                await disk.write(4096, b"x" * 8192)
                assert await disk.read(4096, 8192) == b"x" * 8192
                (device,) = await ask(directory / "control.sock", "list")
                code, table, _ = await run("list", "--embedded", directory)
                assert code == 0
                code, text, _ = await run("list", "--embedded", directory, "--json")
                assert code == 0
            await toolstack.detach(DOMID, line)
            await toolstack.destroy_domain(DOMID)
        assert await daemon.stop() == 0
    assert image.read_bytes()[4096 : 4096 + 8192] == b"x" * 8192
    assert device["name"] == "xbdback5i51712"
    assert device["vdev"] == "xvda"
    assert device["driver"] == "imagefile"
    assert device["image"] == str(image)
    assert device["size"] == MIB
    assert device["mode"] == "rw"
    assert device["state"] == "connected"
    assert device["stats"]["wr_bytes"] == 8192
    assert device["last_error"] is None
    for cell in ("xbdback5i51712", "xvda", "imagefile", "1 MiB", "rw", "connected", "8 KiB"):
        assert cell in table
    assert json.loads(text)[0]["name"] == "xbdback5i51712"
    assert "attach device imagefile:" in daemon.said
    assert "connect identifier 51712 (xvda) of domain 5" in daemon.said
    assert "Traceback" not in daemon.said
    assert "left over" not in daemon.said
    assert not (directory / "control.sock").exists()


async def test_stop_with_a_connected_guest(directory, image):
    line = DiskLine(target=f"imagefile:{image}")
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        async with guest_with(directory, line) as (_, store, guest):
            backend = f"/local/domain/0/backend/vbd3/{DOMID}/{line.devid}"
            async with disk_of(directory, guest, line) as disk:
                await disk.write(0, b"y" * 4096)
                # Watching from before: XenStore ends with the daemon, soon after the answer.
                with trio.fail_after(SECONDS):
                    async with store.watch(f"{backend}/state") as watch:
                        daemon.process.send_signal(signal.SIGTERM)
                        while await store.read(f"{backend}/state") != "5":
                            await watch.changed()
            assert await daemon.ends() == 0
    assert image.read_bytes()[:4096] == b"y" * 4096
    assert "Traceback" not in daemon.said
    assert "left over" not in daemon.said


async def test_a_killed_guest_leaves_nothing(directory, image):
    line = DiskLine(target=f"imagefile:{image}")
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        async with StoreClient.connect(directory / "xenstored.socket") as store:
            async with store.watch("/local/domain/0/backend") as watch:
                async with (
                    guest_with(directory, line) as (_, _, guest),
                    trio.open_nursery() as nursery,
                ):
                    await nursery.start(_use_and_never_close, directory, guest, line)
                    nursery.cancel_scope.cancel()
                with trio.fail_after(SECONDS):
                    while await store.directory(f"/local/domain/0/backend/vbd3/{DOMID}"):
                        await watch.changed()
            assert not await store.is_introduced(DOMID)
            await daemon.says("detach device")
        status = await ask(directory / "control.sock", "status")
        with trio.fail_after(SECONDS):
            while status["devices"]:
                status = await ask(directory / "control.sock", "status")
        assert status["mapped_pages"] == 0
        assert status["bound_ports"] == 0
        assert await daemon.stop() == 0


async def _use_and_never_close(directory, guest, line, *, task_status):
    async with disk_of(directory, guest, line) as disk:
        await disk.write(0, b"z" * 512)
        task_status.started()
        with trio.CancelScope() as forever:
            await trio.sleep_forever()
        assert forever.cancelled_caught


async def test_a_store_that_outlives_the_daemon(directory, image):
    line = DiskLine(target=f"imagefile:{image}")
    async with running("xenstored", directory) as store:
        await store.says("XenStore is served")
        for _ in range(2):
            async with running("serve", "--embedded", directory) as daemon:
                await daemon.says("serves vbd3")
                async with guest_with(directory, line) as (toolstack, _, guest):
                    async with disk_of(directory, guest, line) as disk:
                        await disk.write(0, b"q" * 512)
                    await toolstack.detach(DOMID, line)
                    await toolstack.destroy_domain(DOMID)
                assert await daemon.stop() == 0
        assert await store.stop() == 0


async def test_an_upgrade_that_no_guest_notices(directory, image, tmp_path):
    line = DiskLine(target=f"imagefile:{image}")
    config = tmp_path / "xbd.toml"
    config.write_text('[backend]\non_stop = "keep"\n')
    serve = ("serve", "--config", config, "--embedded", directory)
    async with starter() as start:
        store = await start("xenstored", directory)
        await store.says("XenStore is served")
        old = await start(*serve)
        await old.says("serves vbd3")
        async with (
            guest_with(directory, line) as (_, _, guest),
            disk_of(directory, guest, line) as disk,
        ):
            await disk.write(0, b"1" * 4096)
            assert await old.stop() == 0
            new = await start(*serve)
            await new.says("connect identifier")
            with trio.fail_after(SECONDS):
                assert await disk.read(0, 4096) == b"1" * 4096
                await disk.write(4096, b"2" * 4096)
        assert await new.stop() == 0
        assert "closing the device" not in new.said
        assert await store.stop() == 0
    assert image.read_bytes()[:8192] == b"1" * 4096 + b"2" * 4096


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_both_signals_stop_it(directory, number):
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        assert await daemon.stop(number) == 0
    assert "stopped" in daemon.said


async def test_systemd_is_told(directory, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.setblocking(False)
        environment = {"NOTIFY_SOCKET": tmp_path / "notify"}
        async with running("serve", "--embedded", directory, **environment) as daemon:
            await daemon.says("serves vbd3")
            assert await daemon.stop() == 0
        messages = []
        while True:
            try:
                messages.append(notify.recv(4096).decode())
            except BlockingIOError:
                break
    assert messages[0] == "READY=1"
    assert "STATUS=0 disks of 0 domains" in messages
    assert messages[-1] == "STOPPING=1"


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        ("nonsense:/x", "no driver"),
        ("imagefile:/absent/x.img", "No such file"),
        ("imagefile:/", "directory"),
        ("imagefile", "DRIVER:PATH"),
        ("imagefile:{image}?colour=red", "colour"),
        ("imagefile:{image}?cache=maybe", "cache"),
        ("imagefile:relative.img", "relative.img"),
    ],
)
async def test_a_disk_that_cannot_be_opened_fails_its_attach_with_the_reason(
    directory, image, disk, expected
):
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        async with (
            StoreClient.connect(directory / "xenstored.socket") as store,
            GuestDomain.connect(directory, DOMID, pages=64),
        ):
            toolstack = Toolstack(store)
            await toolstack.create_domain(DOMID, "test")
            with pytest.raises(AttachFailed) as caught:
                await toolstack.attach(DOMID, DiskLine(target=disk.format(image=image)))
        assert await daemon.stop() == 0
    assert expected.lower() in str(caught.value).lower()
    assert "Traceback" not in daemon.said


@pytest.mark.skipif(native.why_not is not None, reason=f"no native data path: {native.why_not}")
async def test_a_driver_of_somebody_else_is_served_natively(directory, tmp_path):
    """It was written for the interface alone; what serves it is none of its business."""
    install(CHUNKS, tmp_path / "packages")
    (tmp_path / "disk").mkdir()
    config = tmp_path / "xbd.toml"
    config.write_text('[backend]\ndatapath = "native"\n')
    environment = {"PYTHONPATH": tmp_path / "packages", "XDG_CACHE_HOME": tmp_path / "cache"}
    line = DiskLine(target=f"chunks:{tmp_path}/disk?size=3M")
    serve = ("serve", "--config", config, "--embedded", directory)
    async with running(*serve, **environment) as daemon:
        await daemon.says("serves vbd3")
        async with (
            guest_with(directory, line) as (_, _, guest),
            disk_of(directory, guest, line) as disk,
        ):
            for letter in (b"1", b"2"):
                await disk.write(MIB - 4096, letter * 8192)
                assert await disk.read(MIB - 4096, 8192) == letter * 8192
            (device,) = await ask(directory / "control.sock", "list")
        assert await daemon.stop() == 0
    assert device["driver"] == "chunks"
    assert device["data_path"].startswith("native, ")
    assert (tmp_path / "disk" / "00000000").read_bytes()[-4096:] == b"2" * 4096
    assert (tmp_path / "disk" / "00000001").read_bytes()[:4096] == b"2" * 4096
    assert "Traceback" not in daemon.said
