"""Requests through real rings: every way to reach pages, every ABI, many sizes."""

from __future__ import annotations

import itertools
import random

import pytest
import trio

from xbd.core.blkif import X86_32, X86_64, constants, encode
from xbd.core.datapath import Features, GrantMode
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice
from xbd.core.frontend import FrontendOptions, RequestFailed
from xbd.core.units import KIB, MIB, PAGE_SIZE

MODES = [GrantMode.PERSISTENT, GrantMode.MAP, GrantMode.COPY]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("abi", [X86_64, X86_32], ids=lambda abi: abi.name)
@pytest.mark.parametrize("resolvable", [True, False])
async def test_random_requests_against_a_model(rig_maker, mode, abi, resolvable):
    size = 2 * MIB
    device = MemoryDevice(size, resolvable=resolvable)
    options = FrontendOptions(
        abi=abi,
        ring_order=1,
        queues=2,
        persistent=mode is GrantMode.PERSISTENT,
        indirect_segments=256,
        data_pages=1200,
    )
    dice = random.Random(f"{mode}{abi.name}{resolvable}")
    model = bytearray(size)
    async with rig_maker(device=device, options=options, grants=mode) as rig:
        assert rig.disk.describe().endswith(mode.value)

        async def one(offset: int, length: int, write: bool) -> None:
            if write:
                data = dice.randbytes(length)
                await rig.front.write(offset, data)
                model[offset : offset + length] = data
            else:
                assert await rig.front.read(offset, length) == model[offset : offset + length]

        for _ in range(12):
            # Disjoint pieces, so that the order of the answers does not matter.
            cuts = sorted({512 * dice.randint(0, size // 512) for _ in range(12)})
            async with trio.open_nursery() as nursery:
                for begin, end in itertools.pairwise(cuts):
                    nursery.start_soon(one, begin, end - begin, dice.random() < 0.5)
        assert device.disk.content == bytes(model)
        assert await rig.front.read(0, size) == bytes(model)
        assert rig.disk.stats.rd_bytes >= size
        assert rig.disk.stats.errors == 0


async def test_sectors_within_pages(rig_maker):
    async with rig_maker() as rig:
        await rig.front.write(0, bytes(range(256)) * 16)
        [page, other] = rig.guest.alloc_pages(2)
        for ref in (page, other):
            rig.guest.grant(ref, rig.front.backend)
            rig.guest.page(ref)[:] = b"\xaa" * PAGE_SIZE
        segments = [(page, 1, 2), (other, 7, 7)]
        entry = encode.encode_rw(X86_64, constants.READ, 0, 2, segments)
        assert await rig.front.raw_request(constants.READ, entry) == constants.RSP_OKAY
        assert rig.guest.page(page)[512:1536] == (bytes(range(256)) * 4)
        assert rig.guest.page(other)[3584:] == (bytes(range(256)) * 2)
        # Nothing outside the segments is touched (XSA-403).
        assert bytes(rig.guest.page(page)[:512]) == b"\xaa" * 512
        assert bytes(rig.guest.page(page)[1536:]) == b"\xaa" * 2560
        assert bytes(rig.guest.page(other)[:3584]) == b"\xaa" * 3584


@pytest.mark.parametrize("mode", MODES)
async def test_a_page_that_is_not_granted_fails_its_request_only(rig_maker, mode):
    options = FrontendOptions(persistent=mode is GrantMode.PERSISTENT)
    async with rig_maker(grants=mode, options=options) as rig:
        [good, bad] = rig.guest.alloc_pages(2)
        rig.guest.grant(good, rig.front.backend)
        for operation in (constants.READ, constants.WRITE):
            entry = encode.encode_rw(X86_64, operation, 0, 0, [(good, 0, 7), (bad, 0, 7)])
            assert await rig.front.raw_request(operation, entry) == constants.RSP_ERROR
            beyond = encode.encode_rw(X86_64, operation, 0, 0, [(1 << 31, 0, 7)])
            assert await rig.front.raw_request(operation, beyond) == constants.RSP_ERROR
        entry = encode.encode_indirect(X86_64, constants.WRITE, 0, 0, 12, [bad])
        assert await rig.front.raw_request(constants.WRITE, entry) == constants.RSP_ERROR
        await rig.front.write(0, b"x" * 64 * KIB)
        assert await rig.front.read(0, 64 * KIB) == b"x" * 64 * KIB
        assert rig.disk.stats.errors == 5


async def test_a_readonly_grant_can_be_written_from_and_not_read_into(rig_maker):
    options = FrontendOptions(persistent=False)
    for mode in (GrantMode.MAP, GrantMode.COPY):
        async with rig_maker(grants=mode, options=options) as rig:
            [page] = rig.guest.alloc_pages(1)
            rig.guest.grant(page, rig.front.backend, readonly=True)
            rig.guest.page(page)[:] = b"r" * PAGE_SIZE
            for operation, status in ((constants.WRITE, 0), (constants.READ, -1)):
                entry = encode.encode_rw(X86_64, operation, 0, 0, [(page, 0, 7)])
                assert await rig.front.raw_request(operation, entry) == status


async def test_a_driver_that_writes_to_what_it_shall_write_fails_its_request_only(rig_maker):
    """The guest's pages are mapped read-only: that must not end the daemon."""

    class Scribbling(MemoryDevice):
        async def writev(self, offset, buffers):
            if offset == 0:
                buffers[0][:] = bytes(len(buffers[0]))
            await super().writev(offset, buffers)

    device = Scribbling(MIB, resolvable=False)
    options = FrontendOptions(persistent=False)
    async with rig_maker(device=device, options=options, grants=GrantMode.MAP) as rig:
        with pytest.raises(RequestFailed):
            await rig.front.write(0, b"w" * 8192)
        await rig.front.write(8192, b"w" * 8192)
        assert await rig.front.read(0, 16384) == bytes(8192) + b"w" * 8192
        assert rig.access.bugs == 1


async def test_the_longest_rings_are_served(rig_maker):
    """32 pages, which an administrator may offer; all of it in flight at once."""
    gate = trio.Event()
    held = Fault(operations={"readv"}, wait=gate, error=None)
    device = FaultDevice(MemoryDevice(MIB), held)
    options = FrontendOptions(ring_order=5, data_pages=1100)
    features = Features(max_ring_order=5)
    async with rig_maker(device=device, options=options, features=features) as rig:
        async with trio.open_nursery() as nursery:
            for number in range(1030):
                nursery.start_soon(rig.front.read, number % 256 * 4096, 4096)
            with trio.fail_after(20):
                while held.hits < 1024:
                    await trio.lowlevel.checkpoint()
            assert rig.disk.connection.in_flight == 1024
            gate.set()
        assert rig.disk.stats.rd_req == 1030


async def test_flush_discard_and_barrier(rig_maker):
    async with rig_maker() as rig:
        await rig.front.write(0, b"a" * 64 * KIB)
        await rig.front.flush()
        await rig.front.barrier()
        await rig.front.discard(4096, 8192)
        data = memoryview(b"b" * 8192)
        for operation in (constants.FLUSH_DISKCACHE, constants.WRITE_BARRIER):
            await rig.front.transfer(32768, data, write=True, operation=operation)
        assert await rig.front.read(32768, 8192) == b"b" * 8192
        stats = rig.disk.stats
        assert (stats.f_req, stats.ds_req, stats.errors) == (2, 1, 0)


async def test_what_is_not_offered_is_answered_so(rig_maker):
    features = Features(flush=False, barrier=False, discard=False, max_indirect_segments=0)
    async with rig_maker(features=features) as rig:
        for request in (rig.front.flush(), rig.front.barrier(), rig.front.discard(0, 4096)):
            with pytest.raises(RequestFailed) as failure:
                await request
            assert failure.value.status == constants.RSP_EOPNOTSUPP
        entry = encode.encode_indirect(X86_64, constants.READ, 0, 0, 12, [1])
        assert await rig.front.raw_request(constants.READ, entry) == constants.RSP_EOPNOTSUPP
        assert await rig.front.raw_request(77, bytes([77]) + bytes(111)) == -2
        await rig.front.write(0, bytes(4096))


async def test_a_read_only_disk_refuses_writes(rig_maker):
    async with rig_maker(read_only=True) as rig:
        assert await rig.front.read(0, 4096) == bytes(4096)
        with pytest.raises(RequestFailed) as failure:
            await rig.front.write(0, b"w" * 4096)
        assert failure.value.status == constants.RSP_ERROR
        assert rig.device.disk.content == bytes(4 * MIB)


async def test_a_corrupt_ring_ends_the_connection_and_nothing_else(rig_maker):
    async def spoil_ring():
        async with rig_maker() as rig:
            queue = rig.front.queues[0]
            words = rig.guest.page(queue.refs[0])[:16].cast("I")
            words[0] = 33
            queue.port.notify()
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as failure:
        await spoil_ring()
    assert "33 requests in a ring of 32" in str(_leaves(failure.value))


def _leaves(error):
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in _leaves(child)]
    return [error]


async def test_reconnect_to_the_same_disk(rig_maker):
    async with rig_maker() as rig:
        await rig.front.write(0, b"1" * 4096)
        for _ in range(3):
            await rig.disk.disconnect(drain=True)
            assert rig.host.hypervisor.mapped_pages == 0
            await rig.connect()
            assert await rig.front.read(0, 4096) == b"1" * 4096


async def test_requests_pushed_before_connecting_are_served(rig_maker):
    """A guest may be long waiting when the daemon starts; its events are lost then."""
    async with rig_maker() as rig:
        await rig.disk.disconnect(drain=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.front.write, 0, b"w" * 40 * KIB)
            await trio.testing.wait_all_tasks_blocked()
            await rig.connect()
        assert await rig.front.read(0, 40 * KIB) == b"w" * 40 * KIB


async def test_the_journal_is_empty_when_nothing_is_in_flight(rig_maker, tmp_path):
    journals = tmp_path / "journal"
    async with rig_maker(journal_dir=journals) as rig:
        await rig.front.write(0, b"j" * 64 * KIB)
        [path] = journals.iterdir()
        assert path.name == "xbdback1i51712.0"
        with trio.fail_after(10):  # what was answered is cleared a moment later
            while any(path.read_bytes()[4096 : 4096 + 32 * 8]):
                await trio.lowlevel.checkpoint()
    assert not list(journals.iterdir())
