"""The hotplug script, run as libxl runs it, against an embedded XenStore."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import trio

from xbd.core.xenstore.client import StoreClient
from xbd.core.xenstore.server import EmbeddedXenStore

SCRIPT = Path(__file__).parent.parent / "scripts/block-xbd"
DEVICE = "backend/vbd3/7/51712"  # as libxl gives it: below the domain's own directory
PATH = f"/local/domain/0/{DEVICE}"
LIBXL_GIVES_UP_S = 40

pytestmark = pytest.mark.skipif(
    shutil.which("xenstore-read") is None, reason="xenstore-utils is not installed"
)


class Libxl:
    """What libxl has done by the time it runs the script, and how it runs it."""

    def __init__(self, store, socket):
        self.store = store
        self._environment = os.environ | {"XENSTORED_PATH": str(socket)}

    async def backend(self, **keys):
        for key, value in ({"state": "2", "params": "aio:imagefile:/a"} | keys).items():
            await self.store.write(f"{PATH}/{key.replace('_', '-')}", value)

    async def run(self, *arguments, **environment):
        with trio.fail_after(LIBXL_GIVES_UP_S):
            return await trio.run_process(
                [SCRIPT, *arguments],
                env=self._environment | environment,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )

    async def add(self):
        return await self.run("add", XENBUS_PATH=DEVICE, XENBUS_TYPE="vbd3")

    async def key(self, name):
        return await self.store.read(f"{PATH}/{name}")


@pytest.fixture
async def libxl():
    # A path short enough for a UNIX socket, whatever the test's name.
    with tempfile.TemporaryDirectory(prefix="xs-") as directory:
        async with (
            EmbeddedXenStore.serve(Path(directory)) as server,
            StoreClient.connect(server.path) as store,
        ):
            yield Libxl(store, server.path)


async def test_open_disk_is_connected(libxl):
    await libxl.backend(xbd_status="open")
    done = await libxl.add()
    assert done.returncode == 0
    assert await libxl.key("hotplug-status") == "connected"
    assert await libxl.key("hotplug-error") is None


async def test_socket_for_qemu_is_where_libxl_looks(libxl):
    await libxl.backend(xbd_status="open", xbd_nbd="/run/xbd/nbd/xbdback7i51712")
    assert (await libxl.add()).returncode == 0
    assert await libxl.key("physical-device-path") == "/run/xbd/nbd/xbdback7i51712"
    assert await libxl.key("hotplug-status") == "connected"


async def test_without_one_libxl_finds_nothing(libxl):
    await libxl.backend(xbd_status="open")
    assert (await libxl.add()).returncode == 0
    assert await libxl.key("physical-device-path") is None


async def test_reason_reaches_libxl(libxl):
    reason = (
        "cannot open imagefile:/a b: No such file or directory (errno 2, ENOENT); 'quoted' $HOME"
    )
    await libxl.backend(xbd_status="error", xbd_error=reason)
    done = await libxl.add()
    assert done.returncode == 1
    assert await libxl.key("hotplug-error") == reason
    assert await libxl.key("hotplug-status") == "error"
    assert reason in done.stderr.decode()


async def test_error_without_reason_has_one_all_the_same(libxl):
    await libxl.backend(xbd_status="error")
    assert (await libxl.add()).returncode == 1
    assert "no reason" in (await libxl.key("hotplug-error"))


async def test_waits_for_a_status_that_comes_late(libxl, tmp_path):
    await libxl.backend()
    path = while_waiting(tmp_path, f"xenstore-write {PATH}/xbd-status open")
    done = await libxl.run("add", XENBUS_PATH=DEVICE, PATH=path)
    assert done.returncode == 0
    assert await libxl.key("hotplug-status") == "connected"


async def test_nobody_answers(libxl, tmp_path):
    await libxl.backend()
    done = await libxl.run("add", XENBUS_PATH=DEVICE, PATH=while_waiting(tmp_path, "exit 0"))
    assert done.returncode == 1
    assert await libxl.key("hotplug-status") == "error"
    assert "xbd is not running, or does not serve vbd3" in (await libxl.key("hotplug-error"))


def while_waiting(directory, command):
    """A PATH with a program `sleep` that does something better."""
    sleep = directory / "sleep"
    sleep.write_text(f"#!/bin/sh\n{command}\n")
    sleep.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


async def test_directory_that_is_gone_stays_gone(libxl):
    done = await libxl.add()
    assert done.returncode == 1
    assert b"is gone" in done.stderr
    assert await libxl.store.directory(PATH) is None


async def test_remove_touches_nothing(libxl):
    await libxl.backend(xbd_status="open", hotplug_status="connected")
    done = await libxl.run("remove", XENBUS_PATH=DEVICE)
    assert done.returncode == 0
    assert await libxl.key("hotplug-status") == "connected"


@pytest.mark.parametrize(("action", "status"), [("add", "connected"), ("2", "connected")])
async def test_arguments_of_the_bsds(libxl, action, status):
    await libxl.backend(xbd_status="open")
    assert (await libxl.run(PATH, action)).returncode == 0
    assert await libxl.key("hotplug-status") == status


@pytest.mark.parametrize("arguments", [(), ("add",), (PATH, "online")])
async def test_wrong_calls_say_so(libxl, arguments):
    done = await libxl.run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(b"block-xbd: ")
