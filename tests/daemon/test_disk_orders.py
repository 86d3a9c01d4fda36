"""What an administrator does with a disk in use, and learns of the daemon: by command."""

from __future__ import annotations

import json

import pytest
import trio
from daemon_process import SECONDS, guest_disk, run, running, starter
from test_disk_snapshots import DISK, MIB

from xbd.core.blkif import XenbusState
from xbd.core.control.client import DaemonUnavailable, ask
from xbd.core.datapath import native
from xbd.core.frontend.errors import RequestFailed


@pytest.fixture(params=["python", "native"])
def datapath(request):
    if request.param == "native" and native.why_not is not None:
        pytest.skip(f"no native data path: {native.why_not}")
    return request.param


async def test_a_disk_is_paused_resumed_and_resized_by_command(tmp_path, datapath):
    directory, image = tmp_path / "host", tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    config = tmp_path / "xbd.toml"
    config.write_text(f'[backend]\ndatapath = "{datapath}"\n')

    async def order(*arguments):
        return await run(*arguments, "--embedded", directory)

    async with running("serve", "--embedded", directory, "--config", config) as daemon:
        await daemon.says("serves vbd3")
        async with guest_disk(directory, f"imagefile:{image}") as disk:
            await disk.write(0, b"1" * 4096)
            assert await order("pause", DISK) == (0, f"Paused {DISK}.\n", "")
            (listed,) = await ask(directory / "control.sock", "list")
            assert listed["paused"]
            assert "connected, paused" in (await order("list"))[1]
            code, _, error = await order("pause", DISK)
            assert (code, error) == (1, f"xbd: the daemon on {directory}/control.sock: {DISK} is "
                                        "paused already\n")  # fmt: skip
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disk.write, 0, b"2" * 4096)
                await trio.testing.wait_all_tasks_blocked(0.1)
                assert image.read_bytes()[:1] == b"1"
                assert await order("resume", DISK) == (0, f"Resumed {DISK}.\n", "")
            assert image.read_bytes()[:4096] == b"2" * 4096
            assert "is not paused" in (await order("resume", DISK))[2]

            state = await disk._store.read(f"{disk.backend_path}/state")
            async with disk._store.watch(f"{disk.backend_path}/state") as watch:
                await watch.changed()  # it always fires once
                assert await order("resize", DISK, "+1M") == (
                    0,
                    f"Resized {DISK}: it has {2 * MIB} bytes now.\n",
                    "",
                )
                with trio.fail_after(10):
                    await watch.changed()
            assert state == str(int(XenbusState.CONNECTED))
            assert await disk._store.read(f"{disk.backend_path}/state") == state
            assert await disk._store.read(f"{disk.backend_path}/sectors") == "4096"
            await disk.write(2 * MIB - 4096, b"e" * 4096)
            code, _, error = await order("resize", DISK, "1536K")
            assert code == 1
            assert "say --shrink if that is meant" in error
            assert image.stat().st_size == 2 * MIB
            assert (await order("resize", DISK, "-512K", "--shrink"))[0] == 0
            assert image.stat().st_size == 3 * MIB // 2
            with pytest.raises(RequestFailed):
                await disk.read(2 * MIB - 4096, 4096)
            assert await disk.read(0, 4096) == b"2" * 4096
        await daemon.says(f"paused {DISK}")
        await daemon.says(f"resized {DISK} from {MIB} to {2 * MIB} bytes")
        assert await daemon.stop() == 0
    assert "Traceback" not in daemon.said


async def test_orders_that_make_no_sense_are_one_line(tmp_path):
    directory, image = tmp_path / "host", tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        async with guest_disk(directory, f"imagefile:{image}"):
            for arguments, said in (
                (("pause", "xbdback5i768"), "there is no disk 'xbdback5i768': xbd list shows"),
                (("resize", "xbdback5i768", "+1G"), "xbdback5i768 is not open: see xbd list"),
                (("resize", DISK, "large"), "size: "),
                (("resize", DISK, "-2M"), f"{DISK} has only {MIB} bytes, not {2 * MIB}"),
                (("resize", DISK, "2000001"), "not a multiple of the logical block"),
                (("resize", DISK, "0", "--shrink"), 'needs "size", in bytes'),
            ):
                code, told, error = await run(*arguments, "--embedded", directory)
                assert (code != 0, told) == (True, "")
                assert said in error
                assert error.count("\n") == 1
            control = directory / "control.sock"
            with pytest.raises(DaemonUnavailable, match='needs "disk", a text'):
                await ask(control, "pause", disk=5)
            with pytest.raises(DaemonUnavailable, match='needs "size", in bytes'):
                await ask(control, "resize", disk=DISK, size=True)
            assert image.stat().st_size == MIB
        assert await daemon.stop() == 0
    assert "Traceback" not in daemon.said


async def test_a_paused_disk_is_closed_when_the_daemon_stops(tmp_path):
    directory, image = tmp_path / "host", tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    async with starter() as start:
        store = await start("xenstored", directory)  # which the guest needs after the daemon's end
        await store.says("XenStore is served")
        daemon = await start("serve", "--embedded", directory)
        await daemon.says("serves vbd3")
        async with guest_disk(directory, f"imagefile:{image}") as disk, trio.open_nursery() as side:
            assert (await run("pause", DISK, "--embedded", directory))[0] == 0
            side.start_soon(disk.write, 0, b"w" * 4096)
            daemon.process.terminate()
            await daemon.says("stopping on SIGTERM")
            with trio.fail_after(SECONDS):
                await disk.wait_backend(XenbusState.CLOSING)
        assert await daemon.ends() == 0
        assert await store.stop() == 0
    assert image.read_bytes()[:4096] == b"w" * 4096


async def test_status_tells_the_data_path_and_why(tmp_path, datapath):
    directory, image = tmp_path / "host", tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    config = tmp_path / "xbd.toml"
    config.write_text(f'[backend]\ndatapath = "{datapath}"\n')
    async with running("serve", "--embedded", directory, "--config", config) as daemon:
        await daemon.says("serves vbd3")
        async with guest_disk(directory, f"imagefile:{image}"):
            code, text, error = await run("status", "--embedded", directory)
            assert (code, error) == (0, "")
            told = json.loads((await run("status", "--json", "--embedded", directory))[1])
        assert await daemon.stop() == 0
    assert told["devices"] == 1
    ((how, count),) = told["connections"].items()
    assert count == 1
    assert how.startswith(f"{datapath}, ")
    assert how.endswith(", persistent")
    assert f"1 x {how}" in text
    assert told["data_path"] in text
    if datapath == "python":
        assert told["data_path"] == "python (as configured)"
    else:
        assert told["data_path"].startswith("native (io_uring, ")
    assert f"process {daemon.process.pid}, up 0:00:" in text


async def test_a_qcow2_image_in_use_can_only_grow(tmp_path):
    directory, image = tmp_path / "host", tmp_path / "disk.qcow2"
    assert (await run("image", "create", f"qcow2:{image}", "1M"))[0] == 0
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        async with guest_disk(directory, f"qcow2:{image}") as disk:
            assert (await run("resize", DISK, "3M", "--embedded", directory))[0] == 0
            await disk.write(3 * MIB - 4096, b"q" * 4096)
            code, _, error = await run("resize", DISK, "1M", "--shrink", "--embedded", directory)
            assert code == 1
            assert "can be made smaller only when it is not in use: xbd image resize" in error
            assert await disk.read(3 * MIB - 4096, 4096) == b"q" * 4096
        assert await daemon.stop() == 0
    assert "Traceback" not in daemon.said
