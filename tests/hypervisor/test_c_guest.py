"""A guest in C, built from docs/embedded.md: its excerpts are the program's very lines."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from xbd.core.errors import GrantFailed
from xbd.core.hypervisor.embedded import EmbeddedHost
from xbd.core.units import PAGE_SIZE, GrantRef, Port

SOURCE = Path(__file__).with_name("guest.c")
DOCUMENT = Path(__file__).parents[2] / "docs" / "embedded.md"
TEXT, READONLY, PORT = GrantRef(1), GrantRef(2), Port(1)
DEADLINE = 20
HOST = """
import pathlib, sys, trio
from xbd.core.hypervisor.embedded import EmbeddedHost

async def serve():
    async with EmbeddedHost.open(pathlib.Path(sys.argv[1])):
        await trio.sleep_forever()

trio.run(serve)
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("guest") / "guest"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1"]
    subprocess.run([compiler, *flags, "-o", target, SOURCE], check=True)
    return target


@pytest.fixture
async def process(program, tmp_path, nursery):
    directory = tmp_path / "xbd"
    directory.mkdir(mode=0o700)
    started = await nursery.start(
        partial(
            trio.run_process,
            [program, directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            check=False,
        )
    )
    yield started
    started.kill()


async def joined(process) -> int:
    """Wait for the guest to say which domain it is."""
    line = b""
    with trio.fail_after(DEADLINE):
        while not line.endswith(b"\n"):
            line += await process.stdout.receive_some(64)
    return int(line.removeprefix(b"joined as "))


async def taken(channel) -> None:
    with trio.fail_after(DEADLINE):
        await trio.lowlevel.wait_readable(channel.fd)
    assert channel.take()


async def converse(host, domid, text: bytes) -> None:
    """Have the guest turn a text into capitals."""
    hypervisor = host.hypervisor
    mapping = hypervisor.map_grants(domid, [TEXT], writable=True)
    channel = hypervisor.bind_interdomain(domid, PORT)
    await taken(channel)
    mapping.view[: len(text) + 1] = text + b"\0"
    channel.notify()
    await taken(channel)
    assert bytes(mapping.view[: len(text)]) == text.upper()
    channel.close()
    mapping.unmap()


async def test_it_shares_pages_and_events(process, tmp_path):
    async with EmbeddedHost.open(tmp_path / "xbd") as host:
        domid = await joined(process)
        assert domid == 1
        mapping = host.hypervisor.map_grants(domid, [TEXT], writable=True)
        assert bytes(mapping.view[:12]) == b"hello from c"
        mapping.unmap()
        both = host.hypervisor.map_grants(domid, [READONLY, TEXT], writable=False)
        assert bytes(both.view[:9]) == b"look only"
        assert bytes(both.view[PAGE_SIZE : PAGE_SIZE + 5]) == b"hello"
        both.unmap()
        with pytest.raises(GrantFailed):
            host.hypervisor.map_grants(domid, [READONLY], writable=True)
        with pytest.raises(GrantFailed):
            host.hypervisor.map_grants(domid, [GrantRef(3)], writable=False)
        await converse(host, domid, b"several words")
        await converse(host, domid, b"and again, bound anew")


async def test_it_outlives_the_host(process, tmp_path):
    for life in (b"first life", b"second life", b"third life"):
        async with EmbeddedHost.open(tmp_path / "xbd") as host:
            assert await joined(process) == 1
            await converse(host, 1, life)


async def test_it_outlives_a_killed_host_too(process, tmp_path, nursery):
    directory = tmp_path / "xbd"
    killed = await nursery.start(
        partial(trio.run_process, [sys.executable, "-c", HOST, directory], check=False)
    )
    assert await joined(process) == 1
    killed.kill()
    with trio.fail_after(DEADLINE):
        await killed.wait()
    async with EmbeddedHost.open(directory) as host:
        assert await joined(process) == 1
        await converse(host, 1, b"after the kill")


async def test_its_death_ends_the_domain(process, tmp_path):
    gone = trio.Event()
    async with EmbeddedHost.open(tmp_path / "xbd", on_guest_lost=lambda _: gone.set()) as host:
        domid = await joined(process)
        mapping = host.hypervisor.map_grants(domid, [TEXT], writable=True)
        channel = host.hypervisor.bind_interdomain(domid, PORT)
        process.send_signal(signal.SIGKILL)
        with trio.fail_after(DEADLINE):
            await gone.wait()
        assert not host.hypervisor.guests
        assert bytes(mapping.view[:5]) == b"hello"
        channel.notify()
        channel.close()
        mapping.unmap()


def test_the_document_shows_this_very_program():
    source = SOURCE.read_text()
    excerpts = re.findall(r"^```c\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(excerpts) >= 5
    for excerpt in excerpts:
        assert excerpt in source
    marked = re.findall(r"^/\* docs: \w+ \*/\n(.*?)^/\* end \*/$", source, re.MULTILINE | re.DOTALL)
    assert sorted(marked) == sorted(excerpts)
