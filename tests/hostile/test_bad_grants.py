"""Grants that are revoked, read-only, repeated or the ring itself; guests that end in between."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing
from hostile_world import DOM0, MODES, SECONDS, U32, until

from xbd.core.blkif import X86_32, constants, encode
from xbd.core.datapath import GrantMode, QueueConfig
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice
from xbd.core.errors import GrantFailed, PortFailed, RingCorrupt
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import MIB, PAGE_SIZE

READ, WRITE = constants.READ, constants.WRITE


@pytest.mark.parametrize("mode", MODES)
async def test_a_page_given_eleven_times_in_one_request(field, mode):
    async with field.attacker(mode=mode) as attacker:
        (page,) = attacker.pages(1)
        view = attacker.guest.page(page)
        view[:] = bytes(range(256)) * 16
        whole = [(page, 0, 7)] * 11
        assert (await attacker.ring.ask(attacker.rw(WRITE, 0, whole)))[0][2] == 0
        assert attacker.device.disk.content[: 11 * PAGE_SIZE] == bytes(view) * 11
        overlapping = [(page, 0, 3), (page, 2, 5), (page, 0, 7)]
        assert (await attacker.ring.ask(attacker.rw(READ, 0, overlapping)))[0][2] == 0
        await attacker.must_serve()


@pytest.mark.parametrize("mode", MODES)
async def test_grants_revoked_while_their_request_is_held(field, mode):
    gate = trio.Event()
    held = Fault(operations={"readv", "writev"}, wait=gate, error=None)
    device = FaultDevice(MemoryDevice(MIB), held)
    async with field.attacker(mode=mode, device=device) as attacker:
        pages = attacker.pages(4)
        attacker.ring.put(
            attacker.rw(READ, 0, [(pages[0], 0, 7), (pages[1], 0, 7)], 1),
            attacker.rw(WRITE, 64, [(pages[2], 0, 7), (pages[3], 0, 7)], 2),
        )
        attacker.ring.publish()
        await until(lambda: held.hits == 2)
        for ref in pages:
            attacker.guest.revoke(ref)
        gate.set()
        answers = await attacker.ring.collect(2)
        # Copying happens late and fails then; what is mapped stays so until the answer.
        read_status = -1 if mode is GrantMode.COPY else 0
        assert sorted(answers) == [(1, READ, read_status), (2, WRITE, 0)]
        await attacker.must_serve()


@pytest.mark.parametrize("mode", MODES)
async def test_the_ring_s_own_page_as_data_of_a_write(field, mode):
    async with field.attacker(mode=mode) as attacker:
        segments = [(attacker.ring.refs[0], 0, 7)] * 3
        answers = await attacker.ring.ask(attacker.rw(WRITE, 0, segments, 7))
        assert answers == [(7, WRITE, 0)]
        await attacker.must_serve()


@pytest.mark.parametrize("mode", MODES)
async def test_the_ring_s_own_page_as_target_of_a_read(field, mode):
    """The disk's bytes become indices and requests: that guest's ring is at its end."""
    async with field.attacker(mode=mode) as attacker:
        os.pwrite(attacker.device.disk.fd, b"\x7f" * PAGE_SIZE, 0)
        attacker.ring.put(attacker.rw(READ, 0, [(attacker.ring.refs[0], 0, 7)], 7))
        attacker.ring.publish()
        await attacker.quiet()
        attacker.ring.port.notify()
        assert isinstance(await attacker.until_ended(), RingCorrupt)


@pytest.mark.parametrize("mode", MODES)
async def test_the_ring_s_own_page_as_indirect_page(field, mode):
    async with field.attacker(mode=mode) as attacker:
        before = attacker.device.disk.content
        entry = encode.encode_indirect(attacker.abi, WRITE, 3, 0, 200, attacker.ring.refs)
        ((request_id, operation, _),) = await attacker.ring.ask(entry)
        assert (request_id, operation) == (3, WRITE)
        assert len(attacker.device.disk.content) == len(before)
        await attacker.must_serve()


async def test_two_rings_on_one_page(field):
    """The backend refuses that (see its tests); a data path that is told so all the same must
    not break anything but this disk."""
    async with field.attacker(queues=2) as attacker:
        await attacker.disconnect()
        first, second = attacker.config().queues
        twins = (first, QueueConfig(ring_refs=first.ring_refs, event_channel=second.event_channel))
        await attacker.connect(queues=twins)
        (page,) = attacker.pages(1)
        for number in range(20):
            attacker.ring.put(attacker.rw(WRITE, number, [(page, 0, 7)], number))
        attacker.ring.publish()
        attacker.rings[1].port.notify()
        await attacker.quiet()


async def test_rings_of_two_disks_on_one_page(field):
    """What one backend answers is a request to the other."""
    async with (
        GuestDomain.connect(field.host.directory, pages=256) as guest,
        field.attacker(guest=guest) as one,
        field.attacker(guest=guest, abi=X86_32, connect=False, alone=False) as other,
    ):
        queue = QueueConfig(ring_refs=tuple(one.ring.refs), event_channel=other.ring.port.port)
        await other.connect(queues=(queue,))
        (page,) = one.pages(1)
        for number in range(20):
            one.ring.put(one.rw(WRITE, number, [(page, 0, 7)], number))
        one.ring.publish()
        other.ring.port.notify()
        await other.quiet()


@pytest.mark.parametrize(
    ("refs", "error"), [((900,), GrantFailed), ((0,), GrantFailed), ((U32,), GrantFailed)]
)
async def test_rings_that_can_t_be_mapped(field, refs, error):
    async with field.attacker(connect=False, may_fail=error) as attacker:
        queue = attacker.config().queues[0]
        with pytest.raises(error):
            await attacker.connect(
                queues=(QueueConfig(ring_refs=refs, event_channel=queue.event_channel),)
            )
        await attacker.connect()
        await attacker.must_serve()


async def test_a_read_only_ring_can_t_be_mapped(field):
    async with field.attacker(connect=False, may_fail=GrantFailed) as attacker:
        attacker.guest.grant(attacker.ring.refs[0], DOM0, readonly=True)
        with pytest.raises(GrantFailed):
            await attacker.connect()


@pytest.mark.parametrize("port", [0, 77, U32])
async def test_ports_that_can_t_be_bound(field, port):
    """The second queue's; what the first had is given back."""
    async with field.attacker(connect=False, queues=2, may_fail=PortFailed) as attacker:
        one, two = attacker.config().queues
        bad = QueueConfig(ring_refs=two.ring_refs, event_channel=port)
        with pytest.raises(PortFailed):
            await attacker.connect(queues=(one, bad))
        field.nothing_is_left()


@pytest.mark.parametrize("mode", MODES)
async def test_a_port_closed_under_way_harms_nobody(field, mode):
    async with field.attacker(mode=mode) as attacker:
        (page,) = attacker.pages(1)
        attacker.ring.port.close()
        attacker.ring.put(attacker.rw(READ, 0, [(page, 0, 7)]))
        attacker.ring.words[0] = attacker.ring.prod
        await attacker.quiet()
        await attacker.disconnect()
        field.nothing_is_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", ["idle", "held", "answered", "behind a barrier"])
async def test_a_guest_that_dies(field, tmp_path, mode, phase):
    """Its socket is closed; the disk is told a little later, and both orders are right."""
    gate = trio.Event()
    held = Fault(operations={"readv", "writev"}, wait=gate, error=None)
    device = FaultDevice(MemoryDevice(MIB), *([held] if phase != "answered" else []))
    async with (
        GuestDomain.connect(field.host.directory, pages=1024) as guest,
        field.attacker(mode=mode, device=device, guest=guest, order=1) as attacker,
    ):
        pages = attacker.pages(2)
        ring = attacker.ring
        if phase != "idle":
            if phase == "behind a barrier":
                ring.put(attacker.rw(constants.WRITE_BARRIER, 0, [(pages[0], 0, 7)], 99))
            for number in range(20):
                operation = number % 2
                page = pages[operation]
                ring.put(attacker.rw(operation, 8 * number, [(page, 0, 7)], number))
            ring.publish()
            await attacker.consumed()
        guest._directory = tmp_path / "nowhere"  # so that it can't come back
        guest._link._connection.shutdown(socket.SHUT_RDWR)
        with trio.fail_after(SECONDS):
            while guest.domid in field.host.hypervisor.guests:
                await trio.testing.wait_all_tasks_blocked(0.001)
        ring.port.notify()
        gate.set()
        await attacker.quiet()
        await field.victim_is_well()
        with trio.fail_after(5):
            await attacker.disconnect()
        field.nothing_is_left()
