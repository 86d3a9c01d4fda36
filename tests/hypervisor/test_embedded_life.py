"""Guests come and go, hosts come and go."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from xbd.core.errors import (
    ConfigError,
    GrantFailed,
    HypervisorLost,
    HypervisorUnavailable,
    PortFailed,
)
from xbd.core.hypervisor.embedded import EmbeddedHost, Limits
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import PAGE_SIZE, Domid, GrantRef, Port

BACKEND = Domid(0)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def guest_areas() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:xbd-guest")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "xbd"


async def serve_until(directory, stop, task_status) -> None:
    async with EmbeddedHost.open(directory):
        task_status.started()
        await stop.wait()


async def wait_readable(fd: int) -> None:
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(fd)


async def test_domids_are_assigned_in_turn_and_not_again(directory):
    async with EmbeddedHost.open(directory) as host:
        async with (
            GuestDomain.connect(directory) as first,
            GuestDomain.connect(directory) as second,
        ):
            assert (first.domid, second.domid) == (1, 2)
            assert set(host.hypervisor.guests) == {1, 2}
        async with GuestDomain.connect(directory, Domid(7)) as chosen:
            assert chosen.domid == 7
    async with EmbeddedHost.open(directory), GuestDomain.connect(directory) as after_restart:
        assert after_restart.domid == 8


async def test_domids_start_again_after_the_last(directory):
    async with EmbeddedHost.open(directory):
        async with GuestDomain.connect(directory, Domid(0x7FEF)):
            pass
        async with GuestDomain.connect(directory) as guest:
            assert guest.domid == 1


async def test_a_domid_has_one_guest_at_a_time(host, guest):
    with pytest.raises(HypervisorUnavailable, match="is connected already"):
        async with GuestDomain.connect(host.directory, guest.domid):
            pass


async def test_the_callbacks_hear_of_guests(directory):
    found: list[Domid] = []
    lost: list[Domid] = []
    gone = trio.Event()

    def on_lost(domid: Domid) -> None:
        assert domid not in host.hypervisor.guests
        lost.append(domid)
        gone.set()

    async with EmbeddedHost.open(
        directory, on_guest_found=found.append, on_guest_lost=on_lost
    ) as host:
        async with GuestDomain.connect(directory) as guest:
            await guest.alloc_port(BACKEND)
            assert found == [1]
        with trio.fail_after(5):
            await gone.wait()
        assert lost == [1]
        async with GuestDomain.connect(directory):
            pass
    assert found[0] == 1
    assert lost == [1] or lost == [1, 2]


async def test_stopping_the_host_is_not_the_end_of_the_domain(directory):
    lost: list[Domid] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            stop, stopped = trio.Event(), trio.Event()

            async def host_life(task_status) -> None:
                async with EmbeddedHost.open(directory, on_guest_lost=lost.append):
                    task_status.started()
                    await stop.wait()
                stopped.set()

            await nursery.start(host_life)
            async with GuestDomain.connect(directory):
                stop.set()
                await stopped.wait()
    assert lost == []


async def test_memory_stays_until_it_is_unmapped(directory):
    before, areas_before = descriptors(), guest_areas()
    gone = trio.Event()
    async with EmbeddedHost.open(directory, on_guest_lost=lambda _: gone.set()) as host:
        async with GuestDomain.connect(directory, pages=16) as guest:
            refs = guest.alloc_pages(3)
            for ref in refs:
                guest.grant(ref, BACKEND)
            guest.page(refs[2])[0] = 42
            port = await guest.alloc_port(BACKEND)
            channel = host.hypervisor.bind_interdomain(guest.domid, port.port)
            whole = host.hypervisor.map_grants(guest.domid, refs, writable=True)
            pieces = host.hypervisor.map_grants(guest.domid, refs[::-1], writable=True)
            domid = guest.domid
        with trio.fail_after(5):
            await gone.wait()
        with pytest.raises(GrantFailed):
            host.hypervisor.map_grants(domid, refs, writable=True)
        with pytest.raises(PortFailed):
            host.hypervisor.bind_interdomain(domid, port.port)
        assert whole.view[2 * PAGE_SIZE] == pieces.view[0] == 42
        whole.view[2 * PAGE_SIZE] = 43
        assert pieces.view[0] == 43
        channel.notify()
        assert channel.take()
        whole.unmap()
        pieces.unmap()
        channel.close()
        assert (host.hypervisor.mapped_pages, host.hypervisor.bound_ports) == (0, 0)
        assert guest_areas() == areas_before
    assert descriptors() == before


async def test_a_guest_hands_everything_to_the_next_host(directory):
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            await nursery.start(serve_until, directory, stop)
            async with GuestDomain.connect(directory, pages=8) as guest:
                (ref,) = guest.alloc_pages(1)
                guest.grant(ref, BACKEND)
                guest.page(ref)[:5] = b"still"
                port = await guest.alloc_port(BACKEND)
                closed = await guest.alloc_port(BACKEND)
                stop.set()
                while guest.connected:
                    await trio.testing.wait_all_tasks_blocked()
                port.notify()  # nobody listens; it is not lost either
                closed.close()
                async with EmbeddedHost.open(directory) as host:
                    await guest.wait_connected()
                    mapping = host.hypervisor.map_grants(guest.domid, [ref], writable=True)
                    assert bytes(mapping.view[:5]) == b"still"
                    channel = host.hypervisor.bind_interdomain(guest.domid, port.port)
                    await wait_readable(channel.fd)
                    channel.notify()
                    await wait_readable(port.fd)
                    with pytest.raises(PortFailed):
                        host.hypervisor.bind_interdomain(guest.domid, closed.port)
                    assert (await guest.alloc_port(BACKEND)).port not in (port.port, closed.port)


async def test_a_port_asked_for_while_there_is_no_host_comes_with_the_next(directory):
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            await nursery.start(serve_until, directory, stop)
            async with GuestDomain.connect(directory, pages=8) as guest:
                stop.set()
                while guest.connected:
                    await trio.testing.wait_all_tasks_blocked()
                ports = []

                async def ask() -> None:
                    ports.append(await guest.alloc_port(BACKEND))

                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                async with EmbeddedHost.open(directory) as host:
                    while not ports:
                        await trio.testing.wait_all_tasks_blocked(0.01)
                    host.hypervisor.bind_interdomain(guest.domid, ports[0].port).close()


async def test_without_reconnect_the_end_of_the_host_is_an_error(directory):
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            await nursery.start(serve_until, directory, stop)

            async def be_a_guest() -> None:
                async with GuestDomain.connect(directory, reconnect=False):
                    stop.set()
                    await trio.sleep_forever()

            with pytest.raises(ExceptionGroup) as caught:
                await be_a_guest()
            assert caught.group_contains(HypervisorLost)


async def test_a_withdrawn_port_cannot_be_bound(host, guest):
    port = await guest.alloc_port(BACKEND)
    port.close()
    port.close()
    other = await guest.alloc_port(BACKEND)  # answered after the withdrawal
    with pytest.raises(PortFailed):
        host.hypervisor.bind_interdomain(guest.domid, port.port)
    host.hypervisor.bind_interdomain(guest.domid, other.port).close()


async def test_a_port_for_another_domain_cannot_be_bound(host, guest):
    port = await guest.alloc_port(Domid(5))
    with pytest.raises(PortFailed):
        host.hypervisor.bind_interdomain(guest.domid, port.port)


async def test_a_page_for_another_domain_cannot_be_mapped(host, guest):
    (ref,) = guest.alloc_pages(1)
    guest.grant(ref, Domid(5))
    with pytest.raises(GrantFailed):
        host.hypervisor.map_grants(guest.domid, [ref], writable=False)


async def test_page_zero_and_the_last_one_work(host, guest):
    for ref in (GrantRef(0), GrantRef(63)):
        guest.grant(ref, BACKEND)
        host.hypervisor.map_grants(guest.domid, [ref], writable=True).unmap()
    for ref in (GrantRef(64), GrantRef(-1), GrantRef(0xFFFFFFFF)):
        with pytest.raises(GrantFailed):
            host.hypervisor.map_grants(guest.domid, [ref], writable=True)


async def test_a_saturated_eventfd_blocks_nobody(host, guest):
    port = await guest.alloc_port(BACKEND)
    channel = host.hypervisor.bind_interdomain(guest.domid, port.port)
    os.eventfd_write(port.fd, 0xFFFFFFFFFFFFFFFE)
    channel.notify()
    channel.notify()
    assert port.take()
    channel.close()


async def test_limits_hold(directory):
    limits = Limits(guests=1, pages=16, ports=2, scattered_pages=4)
    async with EmbeddedHost.open(directory, limits=limits) as host:
        with pytest.raises(HypervisorUnavailable, match="1 to 16"):
            async with GuestDomain.connect(directory, pages=17):
                pass
        async with GuestDomain.connect(directory, pages=16) as guest:
            with pytest.raises(HypervisorUnavailable, match="too many guests"):
                async with GuestDomain.connect(directory, pages=1):
                    pass
            first = await guest.alloc_port(BACKEND)
            await guest.alloc_port(BACKEND)
            with pytest.raises(PortFailed, match="at most 2 ports"):
                await guest.alloc_port(BACKEND)
            first.close()
            await guest.alloc_port(BACKEND)
            refs = guest.alloc_pages(5)
            for ref in refs:
                guest.grant(ref, BACKEND)
            with pytest.raises(GrantFailed, match="too many scattered"):
                host.hypervisor.map_grants(guest.domid, refs[::-1], writable=True)
            host.hypervisor.map_grants(guest.domid, refs, writable=True).unmap()
            four = host.hypervisor.map_grants(guest.domid, refs[3::-1], writable=True)
            four.unmap()
            host.hypervisor.map_grants(guest.domid, refs[3::-1], writable=True).unmap()


async def test_a_directory_has_one_host(host):
    with pytest.raises(ConfigError, match="served by another process"):
        async with EmbeddedHost.open(host.directory):
            pass


async def test_unusable_directories_are_told_plainly(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        async with EmbeddedHost.open(tmp_path / "a" / "b"):
            pass
    with pytest.raises(ConfigError, match="too long"):
        async with EmbeddedHost.open(tmp_path / ("x" * 120)):
            pass
    (tmp_path / "last-domid").write_text("rubbish\n")
    with pytest.raises(ConfigError, match="remove it"):
        async with EmbeddedHost.open(tmp_path):
            pass


async def test_no_host_is_told_plainly(tmp_path):
    with pytest.raises(HypervisorUnavailable, match="no embedded host answers"):
        async with GuestDomain.connect(tmp_path):
            pass


async def test_only_the_owner_may_connect(host):
    mode = (host.directory / "hypervisor.socket").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert stat.S_IMODE(host.directory.stat().st_mode) == 0o700


async def test_pages_are_taken_and_given_back(guest):
    refs = guest.alloc_pages(63)
    assert sorted(refs) == refs == list(range(1, 64))
    with pytest.raises(MemoryError):
        guest.alloc_pages(1)
    guest.free_pages(refs[:4])
    assert guest.alloc_pages(4) == refs[:4]
    assert guest.memory.nbytes == 64 * PAGE_SIZE


async def test_readonly_mappings_are_readonly_for_the_kernel_too(host, guest):
    refs = guest.alloc_pages(3)
    for ref in refs:
        guest.grant(ref, BACKEND, readonly=True)
    reader, writer = os.pipe()
    os.write(writer, b"x" * 10)
    import ctypes

    read = ctypes.CDLL(None, use_errno=True).read
    for order in (refs, refs[::-1]):
        mapping = host.hypervisor.map_grants(guest.domid, order, writable=False)
        assert read(reader, ctypes.c_void_p(mapping.address), 10) == -1
        mapping.unmap()
    os.close(reader)
    os.close(writer)


async def test_unbound_ports_are_named(host, guest):
    with pytest.raises(PortFailed, match="has not offered port 9"):
        host.hypervisor.bind_interdomain(guest.domid, Port(9))
