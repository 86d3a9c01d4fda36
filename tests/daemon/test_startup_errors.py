"""Everything that keeps a command from beginning is one line and a status, never a traceback."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest
import trio
from daemon_process import run, running

from xbd.core.control.client import DaemonUnavailable, ask


async def fails(*arguments, status, says, **environment):
    code, stdout, stderr = await run(*arguments, **environment)
    assert code == status, stderr
    assert stdout == ""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("xbd: ")
    assert says in lines[0]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "xbd.toml"
    path.write_text(f'[backend]\njournal_dir = "{tmp_path}/journal"\n')
    return path


@pytest.mark.parametrize("check", [[], ["--check"]])
async def test_a_malformed_configuration(tmp_path, check):
    path = tmp_path / "xbd.toml"
    path.write_text("[backend]\nkindz = ['vbd']\n")
    says = f"{path}: unknown: backend.kindz"
    await fails("serve", "--config", path, *check, status=2, says=says)
    path.write_text("[backend")
    await fails("serve", "--config", path, *check, status=2, says="not valid TOML")
    absent = tmp_path / "absent.toml"
    await fails("serve", "--config", absent, *check, status=2, says="cannot read")


async def test_a_good_configuration_is_said_to_be_good(config):
    code, stdout, stderr = await run("serve", "--config", config, "--check")
    assert (code, stderr) == (0, "")
    assert "good" in stdout


async def test_xenstored_does_not_run(tmp_path, config):
    config.write_text(config.read_text() + f'[store]\npath = "{tmp_path}/absent"\n')
    await fails("serve", "--config", config, status=1, says=str(tmp_path / "absent"))


async def test_something_else_answers_as_xenstored(tmp_path, config):
    config.write_text(config.read_text() + f'[store]\npath = "{tmp_path}/xbd.toml"\n')
    await fails("serve", "--config", config, status=1, says=str(tmp_path / "xbd.toml"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
        config.write_text(config.read_text().replace("xbd.toml", "dead"))
        await fails("serve", "--config", config, status=1, says=str(tmp_path / "dead"))


@pytest.mark.skipif(os.path.exists("/dev/xen/gntdev"), reason="this is a Xen host")  # noqa: PTH110
async def test_there_is_no_xen(tmp_path, config):
    """The store answers, but there is no hypervisor (or not even its library)."""
    async with running("xenstored", tmp_path / "host") as store:
        await store.says("XenStore is served")
        socket_path = tmp_path / "host" / "xenstored.socket"
        config.write_text(config.read_text() + f'[store]\npath = "{socket_path}"\n')
        await fails("serve", "--config", config, status=1, says="without Xen")


async def test_the_embedded_directory_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    await fails("serve", "--embedded", tmp_path / "file" / "x", status=2, says="cannot make")
    await fails("xenstored", tmp_path / "file" / "x", status=2, says="cannot make")


async def test_a_second_daemon_in_the_same_directory(tmp_path):
    async with running("serve", "--embedded", tmp_path / "host") as daemon:
        await daemon.says("serves vbd3")
        await fails(
            "serve", "--embedded", tmp_path / "host", status=2, says="served by another process"
        )
        await fails("xenstored", tmp_path / "host", status=2, says="host")
        assert await daemon.stop() == 0


async def test_list_without_a_daemon(tmp_path):
    for options in ([], ["--json"]):
        await fails(
            "list", "--socket", tmp_path / "none", *options, status=1, says="no daemon is running"
        )
        await fails("list", "--embedded", tmp_path, *options, status=1, says="no daemon is running")


async def test_list_with_a_daemon_of_another_version(tmp_path):
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "control.sock"))
        old.listen(1)
        old.setblocking(False)
        async with trio.open_nursery() as nursery:

            async def answer():
                await trio.lowlevel.wait_readable(old)
                client, _ = old.accept()
                with client:
                    client.sendall(b'{"v": 9, "ok": true}\n')

            nursery.start_soon(answer)
            await fails("list", "--embedded", tmp_path, status=1, says="another version")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
async def test_no_permission_for_the_control_socket():
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.socket(socket.AF_UNIX) as control,
    ):
        path = Path(directory) / "control.sock"
        path.parent.chmod(0o755)
        control.bind(str(path))
        control.listen(1)
        path.chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(DaemonUnavailable, match="no permission to use control socket"):
                await ask(path, "list")
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("arguments", [["serve", "--nonsense"], ["serve", "extra"], ["xenstored"]])
async def test_wrong_use_is_explained(arguments):
    code, _, stderr = await run(*arguments)
    assert code == 2
    assert "Usage:" in stderr
    assert "Traceback" not in stderr
