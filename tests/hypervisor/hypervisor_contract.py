"""What every Hypervisor must do, in terms of a `World`: a hypervisor and a guest to try it on.

The functions run against the embedded host, and in a Xen dom0 against Xen itself with a "guest"
in the same domain; so they use nothing but pytest and trio.
"""

from __future__ import annotations

import abc
import ctypes
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from xbd.core.errors import GrantFailed, PortFailed
from xbd.core.hypervisor.base import CopyOp, Hypervisor
from xbd.core.units import PAGE_SIZE, Domid, GrantRef, Port

DEADLINE = 20.0  # generous: an emulated Xen is slow


class WorldPort(abc.ABC):
    """The guest's end of an event channel that the backend's domain may bind."""

    port: Port

    @abc.abstractmethod
    def notify(self) -> None: ...

    @abc.abstractmethod
    async def wait(self) -> None:
        """Return when an event has come, and consume it."""

    @abc.abstractmethod
    def take(self) -> bool:
        """Consume a pending event, if there is one."""


class Pages(abc.ABC):
    """Granted pages, as the guest sees them."""

    refs: list[GrantRef]

    @abc.abstractmethod
    def page(self, index: int) -> memoryview: ...

    @abc.abstractmethod
    def revoke(self) -> None:
        """Grant none of them any longer; they must not be mapped."""


class World(abc.ABC):
    """A hypervisor, and a guest on it."""

    hypervisor: Hypervisor
    guest: Domid
    missing_guest: Domid
    """A domid that no domain has."""

    @abc.abstractmethod
    def grant(self, count: int, *, readonly: bool = False) -> Pages: ...

    @abc.abstractmethod
    async def offer_port(self) -> WorldPort: ...


def _bad_ref() -> GrantRef:
    return GrantRef(0x00FFFFFF)


def _fill(pages: Pages, count: int) -> None:
    for index in range(count):
        pages.page(index)[:] = bytes([index + 1]) * PAGE_SIZE


async def check_map_shows_the_guests_pages_side_by_side(world: World) -> None:
    for count in (1, 2, 8):
        pages = world.grant(count)
        _fill(pages, count)
        mapping = world.hypervisor.map_grants(world.guest, pages.refs, writable=True)
        assert mapping.view.format == "B"
        assert mapping.view.nbytes == count * PAGE_SIZE
        expected = b"".join(bytes([index + 1]) * PAGE_SIZE for index in range(count))
        assert bytes(mapping.view) == expected
        assert world.hypervisor.mapped_pages == count
        mapping.unmap()
        assert world.hypervisor.mapped_pages == 0
        pages.revoke()


async def check_map_follows_the_order_of_the_refs(world: World) -> None:
    pages = world.grant(4)
    _fill(pages, 4)
    order = [2, 0, 3, 1]
    refs = [pages.refs[index] for index in order]
    mapping = world.hypervisor.map_grants(world.guest, refs, writable=True)
    assert [mapping.view[place * PAGE_SIZE] for place in range(4)] == [3, 1, 4, 2]
    mapping.view[3 * PAGE_SIZE + 5] = 99
    assert pages.page(1)[5] == 99
    mapping.unmap()


async def check_both_sides_see_each_others_writes(world: World) -> None:
    pages = world.grant(2)
    mapping = world.hypervisor.map_grants(world.guest, pages.refs, writable=True)
    mapping.view[PAGE_SIZE + 7 : PAGE_SIZE + 10] = b"xyz"
    assert bytes(pages.page(1)[7:10]) == b"xyz"
    pages.page(0)[0:3] = b"abc"
    assert bytes(mapping.view[0:3]) == b"abc"
    words = mapping.view.cast("I")
    words[0] = 0xDEADBEEF
    assert bytes(pages.page(0)[0:4]) == b"\xef\xbe\xad\xde"
    words.release()
    mapping.unmap()


async def check_address_is_where_the_view_is(world: World) -> None:
    pages = world.grant(3)
    for refs in (pages.refs[:1], pages.refs, pages.refs[::-1]):
        mapping = world.hypervisor.map_grants(world.guest, refs, writable=True)
        assert mapping.address % PAGE_SIZE == 0
        mapping.view[-1] = 0x5A
        assert ctypes.c_ubyte.from_address(mapping.address + len(mapping.view) - 1).value == 0x5A
        mapping.view[-1] = 0
        mapping.unmap()


async def check_a_page_can_be_mapped_twice(world: World) -> None:
    pages = world.grant(1)
    first = world.hypervisor.map_grants(world.guest, pages.refs, writable=True)
    second = world.hypervisor.map_grants(world.guest, pages.refs, writable=True)
    assert world.hypervisor.mapped_pages == 2
    first.view[0] = 7
    first.unmap()
    assert second.view[0] == 7
    second.unmap()
    assert world.hypervisor.mapped_pages == 0


async def check_unmap_is_idempotent(world: World) -> None:
    pages = world.grant(2)
    mapping = world.hypervisor.map_grants(world.guest, pages.refs, writable=True)
    mapping.unmap()
    mapping.unmap()
    assert world.hypervisor.mapped_pages == 0


async def check_readonly_grants_refuse_writable_maps(world: World) -> None:
    pages = world.grant(2, readonly=True)
    _fill(pages, 2)
    with pytest.raises(GrantFailed):
        world.hypervisor.map_grants(world.guest, pages.refs, writable=True)
    assert world.hypervisor.mapped_pages == 0
    mapping = world.hypervisor.map_grants(world.guest, pages.refs, writable=False)
    assert mapping.view.readonly
    assert mapping.view[PAGE_SIZE] == 2
    mapping.unmap()


async def check_a_readonly_map_of_a_writable_grant_is_readonly(world: World) -> None:
    pages = world.grant(1)
    _fill(pages, 1)
    mapping = world.hypervisor.map_grants(world.guest, pages.refs, writable=False)
    assert mapping.view.readonly
    assert mapping.view[0] == 1
    mapping.unmap()


async def check_map_is_all_or_nothing(world: World) -> None:
    pages = world.grant(2)
    for refs in ([_bad_ref()], [*pages.refs, _bad_ref()], [_bad_ref(), *pages.refs]):
        with pytest.raises(GrantFailed):
            world.hypervisor.map_grants(world.guest, refs, writable=True)
        assert world.hypervisor.mapped_pages == 0
    world.hypervisor.map_grants(world.guest, pages.refs, writable=True).unmap()


async def check_revoked_pages_cannot_be_mapped(world: World) -> None:
    pages = world.grant(2)
    pages.revoke()
    with pytest.raises(GrantFailed):
        world.hypervisor.map_grants(world.guest, pages.refs, writable=False)


async def check_a_missing_domain_has_no_pages(world: World) -> None:
    pages = world.grant(1)
    with pytest.raises(GrantFailed):
        world.hypervisor.map_grants(world.missing_guest, pages.refs, writable=True)


def _copy(world: World, *ops: CopyOp) -> Sequence[int]:
    return world.hypervisor.copy_grants(world.guest, ops)


async def check_copies_go_both_ways(world: World) -> None:
    if not world.hypervisor.can_copy:
        pytest.skip("this platform has no grant copy")
    pages = world.grant(2)
    _fill(pages, 2)
    local = bytearray(1024)
    statuses = _copy(
        world,
        CopyOp(pages.refs[0], 512, memoryview(b"hello"), to_guest=True),
        CopyOp(pages.refs[1], PAGE_SIZE - 1024, memoryview(local), to_guest=False),
    )
    assert list(statuses) == [0, 0]
    assert bytes(pages.page(0)[511:518]) == b"\x01hello\x01"
    assert local == b"\x02" * 1024


async def check_each_copy_has_its_own_status(world: World) -> None:
    if not world.hypervisor.can_copy:
        pytest.skip("this platform has no grant copy")
    pages = world.grant(1)
    readonly = world.grant(1, readonly=True)
    _fill(pages, 1)
    _fill(readonly, 1)
    good, untouched = bytearray(16), bytearray(16)
    statuses = _copy(
        world,
        CopyOp(_bad_ref(), 0, memoryview(untouched), to_guest=False),
        CopyOp(pages.refs[0], PAGE_SIZE - 15, memoryview(untouched), to_guest=False),
        CopyOp(readonly.refs[0], 0, memoryview(b"no"), to_guest=True),
        CopyOp(readonly.refs[0], 0, memoryview(good), to_guest=False),
    )
    assert [status < 0 for status in statuses] == [True, True, True, False]
    assert good == b"\x01" * 16
    assert untouched == bytes(16)
    assert readonly.page(0)[0] == 1


async def check_a_copy_may_fill_the_whole_page(world: World) -> None:
    if not world.hypervisor.can_copy:
        pytest.skip("this platform has no grant copy")
    pages = world.grant(1)
    _fill(pages, 1)
    local = bytearray(PAGE_SIZE)
    assert list(_copy(world, CopyOp(pages.refs[0], 0, memoryview(local), to_guest=False))) == [0]
    assert local == b"\x01" * PAGE_SIZE
    assert list(_copy(world)) == []


async def check_events_go_both_ways(world: World) -> None:
    guest_port = await world.offer_port()
    channel = world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    assert world.hypervisor.bound_ports == 1
    with trio.fail_after(DEADLINE):
        await trio.lowlevel.wait_readable(channel.fd)
        assert channel.take()
        channel.unmask()
        guest_port.notify()
        await trio.lowlevel.wait_readable(channel.fd)
        assert channel.take()
        channel.unmask()
        channel.notify()
        await guest_port.wait()
    channel.close()
    assert world.hypervisor.bound_ports == 0


async def check_a_new_channel_is_pending_at_once(world: World) -> None:
    guest_port = await world.offer_port()
    channel = world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    with trio.fail_after(DEADLINE):
        await trio.lowlevel.wait_readable(channel.fd)
    assert channel.take()
    assert not channel.take()
    channel.close()


async def check_events_while_masked_are_kept(world: World) -> None:
    guest_port = await world.offer_port()
    channel = world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    with trio.fail_after(DEADLINE):
        await trio.lowlevel.wait_readable(channel.fd)
        assert channel.take()
        for _ in range(5):
            guest_port.notify()
        channel.unmask()
        await trio.lowlevel.wait_readable(channel.fd)
        assert channel.take()
    channel.unmask()
    assert not channel.take()
    channel.close()


async def check_a_port_can_be_bound_only_once(world: World) -> None:
    guest_port = await world.offer_port()
    channel = world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    with pytest.raises(PortFailed):
        world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    channel.close()
    again = world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    with trio.fail_after(DEADLINE):
        await trio.lowlevel.wait_readable(again.fd)
    again.close()


async def check_each_channel_has_its_own_events(world: World) -> None:
    first_port, second_port = await world.offer_port(), await world.offer_port()
    first = world.hypervisor.bind_interdomain(world.guest, first_port.port)
    second = world.hypervisor.bind_interdomain(world.guest, second_port.port)
    assert first.fd != second.fd
    with trio.fail_after(DEADLINE):
        for channel in (first, second):
            await trio.lowlevel.wait_readable(channel.fd)
            assert channel.take()
            channel.unmask()
        second_port.notify()
        await trio.lowlevel.wait_readable(second.fd)
    assert not first.take()
    assert second.take()
    first.close()
    second.close()


async def check_ports_nobody_offered_cannot_be_bound(world: World) -> None:
    with pytest.raises(PortFailed):
        world.hypervisor.bind_interdomain(world.guest, Port(1023))
    guest_port = await world.offer_port()
    with pytest.raises(PortFailed):
        world.hypervisor.bind_interdomain(world.missing_guest, guest_port.port)
    assert world.hypervisor.bound_ports == 0


async def check_a_closed_channel_is_harmless(world: World) -> None:
    guest_port = await world.offer_port()
    channel = world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    channel.close()
    channel.close()
    channel.notify()
    assert not channel.take()


async def check_close_wakes_a_waiting_task(world: World) -> None:
    guest_port = await world.offer_port()
    channel = world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    assert await _taken(channel.fd)
    channel.take()
    channel.unmask()
    closed = trio.Event()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(channel.fd)
        closed.set()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            channel.close()
    assert closed.is_set()


async def _taken(fd: int) -> bool:
    with trio.fail_after(DEADLINE):
        await trio.lowlevel.wait_readable(fd)
    return True


async def check_close_gives_everything_back(world: World) -> None:
    pages = world.grant(3)
    world.hypervisor.map_grants(world.guest, pages.refs, writable=True)
    world.hypervisor.map_grants(world.guest, pages.refs[::-1], writable=False)
    guest_port = await world.offer_port()
    world.hypervisor.bind_interdomain(world.guest, guest_port.port)
    assert (world.hypervisor.mapped_pages, world.hypervisor.bound_ports) == (6, 1)
    world.hypervisor.close()
    world.hypervisor.close()
    assert (world.hypervisor.mapped_pages, world.hypervisor.bound_ports) == (0, 0)


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]
"""All of the above, for pytest.mark.parametrize."""
