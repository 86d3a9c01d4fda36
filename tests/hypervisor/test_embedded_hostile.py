"""What a hostile guest may try.  The host must not notice more than a line in its log."""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.errors import GrantFailed
from xbd.core.hypervisor.embedded import EmbeddedHost, Limits
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.hypervisor.embedded_wire import (
    Hello,
    Offer,
    Withdraw,
    decode_reply,
    grant_entry,
    socket_path,
)
from xbd.core.units import PAGE_SIZE, Domid, GrantRef, Port

PAGES = 4
MFD_HUGETLB = 4


def memfd(size: int, *, seals: int = fcntl.F_SEAL_SHRINK, flags: int = 0) -> int:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def reopened_for_reading() -> int:
    fd = memfd(PAGES * PAGE_SIZE)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


MAKERS = {
    "memory": lambda: memfd(PAGES * PAGE_SIZE),
    "table": lambda: memfd(PAGES * 8),
    "unsealed": lambda: memfd(PAGES * PAGE_SIZE, seals=0),
    "unwritable": lambda: memfd(PAGES * PAGE_SIZE, seals=fcntl.F_SEAL_SHRINK | 0x10),
    "read-only": reopened_for_reading,
    "short": lambda: memfd(PAGES * PAGE_SIZE - 1),
    "empty": lambda: memfd(0),
    "pipe": pipe_end,
    "null": lambda: os.open("/dev/null", os.O_RDWR),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "eventfd": lambda: os.eventfd(0),
    "full eventfd": lambda: os.eventfd(0xFFFFFFFF),
    "semaphore": lambda: os.eventfd(0, os.EFD_SEMAPHORE),
}


@contextmanager
def descriptors(names: list[str]) -> Iterator[list[int]]:
    fds = [MAKERS[name]() for name in names]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def fdinfo(fd: int) -> str:
    return Path(f"/proc/self/fdinfo/{fd}").read_text()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def connect(host: EmbeddedHost) -> trio.socket.SocketType:
    connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    await connection.connect(str(socket_path(host.directory)))
    return connection


async def send(connection: trio.socket.SocketType, packet: bytes, names: list[str]) -> None:
    with descriptors(names) as fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        await connection.sendmsg([packet], rights)


async def answer(connection: trio.socket.SocketType) -> int | None:
    """The next reply's errno, None at the end of the connection."""
    with trio.fail_after(5):
        packet = await connection.recv(1000)
    return decode_reply(packet).errno if packet else None


HELLO = Hello(1, None, PAGES).encode()
GOOD = ["memory", "table"]


@pytest.mark.parametrize(
    ("packet", "names", "expected"),
    [
        (b"x", [], errno.EPROTO),
        (HELLO[:31], GOOD, errno.EPROTO),
        (HELLO + b"x", GOOD, errno.EPROTO),
        (HELLO, [], errno.EPROTO),
        (HELLO, ["memory"], errno.EPROTO),
        (HELLO, [*GOOD, "null"], errno.EPROTO),
        (HELLO, [*GOOD, *["null"] * 200], errno.EPROTO),
        (HELLO, ["unsealed", "table"], errno.EPERM),
        (HELLO, ["memory", "unsealed"], errno.EPERM),
        (HELLO, ["unwritable", "table"], errno.EPERM),
        (HELLO, ["read-only", "table"], errno.EACCES),
        (HELLO, ["short", "table"], errno.EINVAL),
        (HELLO, ["memory", "empty"], errno.EINVAL),
        (HELLO, ["pipe", "table"], errno.EINVAL),
        (HELLO, ["null", "table"], errno.EINVAL),
        (HELLO, ["directory", "table"], errno.EINVAL),
        (HELLO, ["eventfd", "eventfd"], errno.EINVAL),
        (Hello(1, None, 0).encode(), GOOD, errno.E2BIG),
        (Hello(1, None, 0xFFFFFFFF).encode(), GOOD, errno.E2BIG),
        (Hello(1, Domid(0), PAGES).encode(), GOOD, errno.EINVAL),
        (struct.pack("<8I", 1, 1, 0x48444258, 2, 0xFFFFFFFF, 4, 0, 0), GOOD, errno.EPROTONOSUPPORT),
        (struct.pack("<8I", 1, 1, 0x12345678, 1, 0xFFFFFFFF, 4, 0, 0), GOOD, errno.EPROTO),
        (struct.pack("<8I", 1, 1, 0x48444258, 1, 0xFFFFFFFF, 4, 1, 0), GOOD, errno.EPROTO),
        (Offer(1, Port(1), Domid(0)).encode(), ["eventfd", "eventfd"], errno.EPROTO),
        (Withdraw(1, Port(1)).encode(), [], errno.EPROTO),
    ],
)
async def test_a_bad_first_message_is_refused_in_words(host, packet, names, expected):
    before = open_descriptors()
    with await connect(host) as connection:
        await send(connection, packet, names)
        assert await answer(connection) == expected
        assert await answer(connection) is None
    assert host.hypervisor.guests == {}
    assert open_descriptors() == before


async def test_memory_of_huge_pages_is_refused(host):
    try:
        fd = memfd(2 << 20, flags=MFD_HUGETLB)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    with await connect(host) as connection:
        with descriptors(["table"]) as (table,):
            rights = array.array("i", [fd, table])
            await connection.sendmsg([HELLO], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert await answer(connection) == errno.EINVAL
    os.close(fd)


@pytest.mark.parametrize(
    ("packet", "names", "expected", "goes_on"),
    [
        (HELLO, GOOD, errno.EPROTO, False),
        (b"?" * 32, [], errno.EPROTO, False),
        (b"?" * 32, ["null"] * 2, errno.EPROTO, False),
        (Offer(1, Port(1), Domid(0)).encode(), [], errno.EPROTO, False),
        (Offer(1, Port(1), Domid(0)).encode(), ["pipe", "eventfd"], errno.EINVAL, False),
        (Offer(1, Port(1), Domid(0)).encode(), ["eventfd", "memory"], errno.EINVAL, False),
        (Offer(1, Port(1), Domid(0)).encode(), ["eventfd", "directory"], errno.EINVAL, False),
        (Offer(1, Port(7), Domid(0)).encode(), ["eventfd", "eventfd"], errno.EEXIST, True),
        (Withdraw(1, Port(7)).encode(), ["null"], errno.EPROTO, False),
        (Withdraw(1, Port(9)).encode(), [], errno.ENOENT, True),
        (Withdraw(1, Port(7)).encode(), [], 0, True),
    ],
)
async def test_a_bad_later_message_ends_only_that_guest(host, packet, names, expected, goes_on):
    with await connect(host) as connection:
        await send(connection, HELLO, GOOD)
        assert await answer(connection) == 0
        await send(connection, Offer(1, Port(7), Domid(0)).encode(), ["eventfd", "eventfd"])
        assert await answer(connection) == 0
        await send(connection, packet, names)
        assert await answer(connection) == expected
        if goes_on:
            await send(connection, Withdraw(1, Port(99)).encode(), [])
            assert await answer(connection) == errno.ENOENT
        else:
            assert await answer(connection) is None
            assert host.hypervisor.guests == {}


async def test_semaphores_are_refused(host):
    with descriptors(["semaphore"]) as (fd,):
        if "eventfd-semaphore" not in fdinfo(fd):
            pytest.skip("this kernel does not tell")
    with await connect(host) as connection:
        await send(connection, HELLO, GOOD)
        assert await answer(connection) == 0
        await send(connection, Offer(1, Port(1), Domid(0)).encode(), ["semaphore", "eventfd"])
        assert await answer(connection) == errno.EINVAL


async def test_memory_sealed_against_writing_later_refuses_only_new_mappings(host):
    with await connect(host) as connection:
        ram, table = memfd(PAGES * PAGE_SIZE), memfd(PAGES * 8)
        view = mmap.mmap(table, PAGES * 8)
        view[:] = struct.pack("<Q", grant_entry(Domid(0), readonly=False)) * PAGES
        rights = array.array("i", [ram, table])
        await connection.sendmsg([HELLO], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert await answer(connection) == 0
        domid = max(host.hypervisor.guests)
        fcntl.fcntl(ram, fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE
        pages = [GrantRef(2), GrantRef(0)]
        with pytest.raises(GrantFailed):
            host.hypervisor.map_grants(domid, pages, writable=True)
        host.hypervisor.map_grants(domid, pages, writable=False).unmap()
        host.hypervisor.map_grants(domid, pages[:1], writable=True).unmap()
        for fd in (ram, table):
            os.close(fd)


async def test_holes_punched_into_memory_read_as_zeroes(host, guest):
    import ctypes

    refs = guest.alloc_pages(2)
    for ref in refs:
        guest.grant(ref, Domid(0))
        guest.page(ref)[:] = b"x" * PAGE_SIZE
    mapping = host.hypervisor.map_grants(guest.domid, refs[::-1], writable=True)
    libc = ctypes.CDLL(None, use_errno=True)
    off = ctypes.c_long
    keep_size_and_punch = 3
    size = guest.memory.nbytes
    assert libc.fallocate(guest._ram_fd, keep_size_and_punch, off(0), off(size)) == 0
    assert bytes(mapping.view) == bytes(2 * PAGE_SIZE)
    mapping.unmap()


@given(entry=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 15), st.integers(0, 1 << 20)))
def test_only_exact_entries_grant(entry):
    async def run() -> None:
        with tempfile.TemporaryDirectory() as name:
            async with (
                EmbeddedHost.open(Path(name)) as host,
                GuestDomain.connect(Path(name), pages=2) as guest,
            ):
                guest._table[1] = entry
                for writable in (False, True):
                    allowed = (1,) if writable else (1, 5)
                    try:
                        host.hypervisor.map_grants(
                            guest.domid, [GrantRef(1)], writable=writable
                        ).unmap()
                    except GrantFailed:
                        assert entry not in allowed
                    else:
                        assert entry in allowed

    trio.run(run)


words = st.sampled_from([0, 1, 2, 3, 4, 7, 0x48444258, 0x7FEF, 0x7FF0, 2**31, 2**32 - 1])
packets = st.one_of(
    st.binary(max_size=40),
    st.lists(words, min_size=8, max_size=8).map(lambda some: struct.pack("<8I", *some)),
    st.builds(lambda domid: Hello(1, domid, PAGES).encode(), st.sampled_from([None, 1, 2])),
    st.builds(lambda port: Offer(2, port, Domid(0)).encode(), st.integers(0, 3)),
    st.builds(lambda port: Withdraw(3, port).encode(), st.integers(0, 3)),
)
descriptor_names = st.one_of(
    st.just(GOOD),
    st.just(["eventfd", "full eventfd"]),
    st.just([]),
    st.lists(st.sampled_from(sorted(MAKERS)), max_size=4),
)
conversations = st.tuples(
    st.booleans(), st.lists(st.tuples(packets, descriptor_names), max_size=8), st.booleans()
)


async def converse(host: EmbeddedHost, conversation) -> None:
    polite, messages, listens = conversation
    with await connect(host) as connection:
        if polite:
            await send(connection, HELLO, GOOD)
        try:
            for packet, names in messages:
                await send(connection, packet, names)
            if listens:
                connection.shutdown(socket.SHUT_WR)
                while await answer(connection) is not None:
                    pass
        except (BrokenPipeError, ConnectionResetError):
            pass


@given(st.lists(conversations, min_size=1, max_size=3))
def test_no_conversation_harms_the_host_or_another_guest(several):
    async def run(directory: Path) -> None:
        async with EmbeddedHost.open(directory, limits=Limits(ports=2)) as host:
            async with GuestDomain.connect(directory, Domid(3), pages=2) as guest:
                guest.grant(GrantRef(1), Domid(0))
                port = await guest.alloc_port(Domid(0))
                mapping = host.hypervisor.map_grants(3, [GrantRef(1)], writable=True)
                async with trio.open_nursery() as nursery:
                    for conversation in several:
                        nursery.start_soon(converse, host, conversation)
                mapping.view[0] = 9
                assert guest.page(GrantRef(1))[0] == 9
                mapping.unmap()
                host.hypervisor.bind_interdomain(Domid(3), port.port).close()
                assert guest.connected
            with trio.fail_after(5):
                while host._connections:
                    await trio.testing.wait_all_tasks_blocked(0.001)
            assert host.hypervisor.guests == {}
            assert host.hypervisor.mapped_pages == host.hypervisor.bound_ports == 0

    before = open_descriptors()
    with tempfile.TemporaryDirectory() as name:
        trio.run(run, Path(name))
    assert open_descriptors() == before
