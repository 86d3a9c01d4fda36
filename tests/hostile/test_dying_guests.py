"""Guests that come and go without end, on the embedded host."""

from __future__ import annotations

import array
import os
import socket

import structlog
import trio
import trio.testing
from hostile_world import SECONDS

from xbd import hosts
from xbd.core.hypervisor.embedded import EmbeddedHost
from xbd.core.hypervisor.embedded_guest import _sealed_memfd
from xbd.core.hypervisor.embedded_wire import Hello, socket_path
from xbd.core.units import PAGE_SIZE


async def come_and_go(directory, domid=None) -> None:
    """HELLO, and gone."""
    fds = [_sealed_memfd("ram", PAGE_SIZE), _sealed_memfd("grants", PAGE_SIZE)]
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        await connection.connect(str(socket_path(directory)))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        await connection.sendmsg([Hello(1, domid, 1).encode()], rights)
        await connection.recv(100)
    for fd in fds:
        os.close(fd)


async def test_guests_that_come_and_go_by_the_hundred_are_few_lines(tmp_path):
    with structlog.testing.capture_logs() as log:
        async with EmbeddedHost.open(tmp_path / "host") as host:
            for _ in range(300):
                await come_and_go(host.directory)
            with trio.fail_after(SECONDS):
                while host.hypervisor.guests:
                    await trio.testing.wait_all_tasks_blocked(0.001)
            for _ in range(100):
                with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                    await connection.connect(str(socket_path(host.directory)))
                    await connection.send(b"nonsense")
                    await connection.recv(100)
    assert len(log) < 100


async def test_more_dead_guests_than_can_be_buried_at_a_time(tmp_path):
    """Nobody buries them here at all; every domain is remembered, and none twice."""
    directory = tmp_path / "host"
    async with hosts.embedded_host(directory) as host:
        for _ in range(3):
            for domid in (5, 6, 7):
                await come_and_go(directory, domid)
                with trio.fail_after(SECONDS):
                    while host.hypervisor.guests:
                        await trio.testing.wait_all_tasks_blocked(0.001)
        assert host.lost is not None
        found = []
        with trio.move_on_after(0.2):
            while True:
                found.append(await host.lost.next())
        assert found == [5, 6, 7]
