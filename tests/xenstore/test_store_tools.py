"""Other people's programs work on the embedded XenStore: xenstore-utils and pyxs."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import pyxs
import trio

from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient

WITHIN_S = 20
needs_tools = pytest.mark.skipif(
    shutil.which("xenstore-ls") is None, reason="xenstore-utils is not installed"
)


@pytest.fixture
def tool(tools_environment):
    async def run(*command, check=True):
        with trio.fail_after(WITHIN_S):
            result = await trio.run_process(
                command,
                env=tools_environment,
                capture_stdout=True,
                capture_stderr=True,
                check=check,
            )
        return result.stdout.decode()

    return run


@needs_tools
async def test_write_read_list_remove(tool):
    await tool("xenstore-write", "/a/b", "one", "/a/c", "two")
    assert await tool("xenstore-read", "/a/b", "/a/c") == "one\ntwo\n"
    assert await tool("xenstore-list", "/a") == "b\nc\n"
    await tool("xenstore-exists", "/a/b")
    await tool("xenstore-rm", "/a/b")
    assert await tool("xenstore-list", "/a") == "c\n"
    with pytest.raises(subprocess.CalledProcessError):
        await tool("xenstore-read", "/a/b")


@needs_tools
async def test_ls_and_chmod(tool):
    await tool("xenstore-write", "/a/b", "one")
    await tool("xenstore-chmod", "-r", "/a", "n7", "r8", "b9")
    lines = (await tool("xenstore-ls", "-p", "-f", "/a")).splitlines()
    assert [line.split() for line in lines] == [["/a/b", "=", '"one"', "(n7,r8,b9)"]]


@needs_tools
async def test_ls_of_a_long_directory(server, tool):
    async with StoreClient.connect(server.path) as store:
        for number in range(300):
            await store.write(f"/long/a-name-of-some-length-{number}", "1")
    assert len((await tool("xenstore-list", "/long")).splitlines()) == 300
    assert len((await tool("xenstore-ls", "-f", "/long")).splitlines()) == 300


@needs_tools
async def test_watch(server, tool, tools_environment):
    process = await trio.lowlevel.open_process(
        ["xenstore-watch", "-n", "2", "/a"], env=tools_environment, stdout=subprocess.PIPE
    )
    with trio.fail_after(WITHIN_S):
        assert await process.stdout.receive_some() == b"/a\n"
        async with StoreClient.connect(server.path) as store:
            await store.write("/a/b", "1")
        assert await process.stdout.receive_some() == b"/a/b\n"
        await process.wait()
    await process.stdout.aclose()


async def test_pyxs(server, monkeypatch):
    monkeypatch.setattr(pyxs.Client, "SU", True)

    def talk():
        with pyxs.Client(unix_socket_path=str(server.path)) as client:
            client[b"/a/b"] = b"one"
            assert client[b"/a/b"] == b"one"
            assert client.list(b"/a") == [b"b"]
            client.set_perms(b"/a/b", [b"n0", b"r5"])
            assert client.get_perms(b"/a/b") == [b"n0", b"r5"]
            assert client.get_domain_path(5) == b"/local/domain/5"
            client.introduce_domain(5, 1, 1)
            assert client.is_domain_introduced(5)
            client.transaction()
            client[b"/a/c"] = b"two"
            assert client.commit()
            assert sorted(client.list(b"/a")) == [b"b", b"c"]
            client.delete(b"/a")
            assert not client.exists(b"/a")
            client.release_domain(5)
            assert not client.is_domain_introduced(5)

    with trio.fail_after(WITHIN_S):
        await trio.to_thread.run_sync(talk)


async def test_pyxs_monitor(server):
    def talk():
        with pyxs.Client(unix_socket_path=str(server.path)) as client:
            monitor = client.monitor()
            monitor.watch(b"/a", b"token")
            events = monitor.wait()
            assert next(events) == (b"/a", b"token")
            client[b"/a/b"] = b"one"
            assert next(events) == (b"/a/b", b"token")
            monitor.unwatch(b"/a", b"token")

    with trio.fail_after(WITHIN_S):
        await trio.to_thread.run_sync(talk)


async def test_pyxs_as_a_guest(server):
    def talk():
        with pyxs.Client(unix_socket_path=str(server.path_for(Domid(5)))) as client:
            client[b"data/a"] = b"one"
            assert client[b"data/a"] == b"one"
            assert client[b"/local/domain/5/data/a"] == b"one"
            assert client.get_perms(b"data/a") == [b"n5"]
            with pytest.raises(pyxs.PyXSError):
                client[b"/local/domain/0/x"] = b"1"

    async with StoreClient.connect(server.path) as dom0:
        await dom0.introduce(Domid(5))
        await dom0.mkdir("/local/domain/5")
        await dom0.set_permissions("/local/domain/5", ["n5"])
        with trio.fail_after(WITHIN_S):
            await trio.to_thread.run_sync(talk)
