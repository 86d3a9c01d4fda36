"""Memory, requests, clients and patience have bounds, and nobody starves for them."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from nbd_client import BLOCK_STATUS, DISC, FLUSH, READ, WRITE, Gone, option, request
from nbd_rig import SIZE, memory, serving

from xbd.core.driver.testing import Fault, FaultDevice
from xbd.core.nbd import Limits, listening
from xbd.core.nbd.buffers import BufferPool
from xbd.core.nbd.limits import REPLY_BYTES, Budget, Share

KIB = 1024


def gated() -> tuple[FaultDevice, trio.Event]:
    gate = trio.Event()
    fault = Fault(operations={"readv", "writev", "flush"}, wait=gate, error=None)
    return FaultDevice(memory(), fault), gate


async def for_ever(call: Callable[..., Awaitable[object]], *arguments: object) -> None:
    while True:
        await call(*arguments)


def begun(device: FaultDevice) -> int:
    return device.faults[0].hits


def test_shares_of_a_budget() -> None:
    budget = Budget(Limits(requests=3, connection_bytes=100, export_bytes=150, reserved_bytes=10))
    one, other, third = Share(budget), Share(budget), Share(budget)
    assert one.take(300)  # alone, and nobody else has anything
    assert not other.take(11)
    assert other.take(10)  # its reserve
    assert not other.take(1)
    one.give(1, 300)
    assert one.take(90)
    assert not one.take(11)
    assert one.take(10)
    assert one.take(0)
    assert not one.take(0)
    assert budget.bytes == 110
    assert not third.take(41)
    assert third.take(40)
    for share, requests, size in ((one, 3, 100), (other, 1, 10), (third, 1, 40)):
        share.give(requests, size)
        assert (share.requests, share.bytes) == (0, 0)
    assert budget.bytes == 0


def test_buffers_are_used_again_and_never_shared() -> None:
    pool = BufferPool()
    buffers = [pool.take(length) for length in (1, 4096, 4097, 65536, 1 << 20, 33 << 20)]
    assert [buffer.size for buffer in buffers] == [4096, 4096, 8192, 65536, 1 << 20, 64 << 20]
    spans = sorted((buffer.address, buffer.address + buffer.size) for buffer in buffers)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    for buffer in buffers:
        assert buffer.address % 4096 == 0
        assert len(buffer.view) == buffer.size
        pool.give(buffer)
    assert pool.take(4000) in buffers[:2]
    pool.clear()
    pool.give(buffers[0])
    assert pool.take(1) is buffers[0]


async def test_a_connection_has_so_many_requests_in_flight():
    device, gate = gated()
    async with serving(device, limits=Limits(requests=5)) as rig:
        client = await rig.client()
        for _ in range(12):
            await client.send(READ, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        assert begun(device) == 5
        gate.set()
        for _ in range(12):
            assert not (await client.reply())[1].error
        assert begun(device) == 12
        await client.disconnect()


async def test_a_connection_has_so_many_bytes_in_flight():
    device, gate = gated()
    async with serving(device, limits=Limits(connection_bytes=100 * KIB)) as rig:
        client = await rig.client()
        for _ in range(3):
            await client.send(WRITE, 0, data=bytes(40 * KIB))
        await client.send(READ, 0, 200 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        assert begun(device) == 2
        gate.set()
        for _ in range(4):
            assert not (await client.reply())[1].error
        await client.disconnect()


@pytest.mark.parametrize("kind", [READ, FLUSH, BLOCK_STATUS])
async def test_who_does_not_read_is_not_read_from(kind: int):
    """...and the others never notice."""
    limits = Limits(requests=50, connection_bytes=4 << 20)
    async with serving(limits=limits) as rig:
        client, other = await rig.client(), await rig.client()
        length = 0 if kind == FLUSH else 64 * KIB
        piece = b"".join(request(kind, 0, length, cookie=n) for n in range(100))
        pieces = 0

        async def flood() -> None:
            nonlocal pieces
            while True:
                await client.say(piece)
                pieces += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            # Nothing happens any more, because everything is full.
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert 0 < rig.server._budget.bytes <= limits.connection_bytes
            before = pieces
            await other.write(0, b"x" * 4096)
            assert await other.read(0, 4096) == b"x" * 4096
            assert pieces == before
            nursery.cancel_scope.cancel()
        await client.stream.aclose()
        await other.disconnect()


async def test_who_reads_late_gets_everything():
    async with serving(limits=Limits(requests=16)) as rig:
        client = await rig.client()
        await client.write(0, os.urandom(SIZE))
        content = await client.read(0, SIZE)

        async def send_all() -> None:
            for number in range(200):
                await client.send(READ, number * 512, 256 * KIB)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(200):
                _, reply = await client.reply()
                (offset,) = reply.data
                assert reply.content == content[offset : offset + 256 * KIB]
        await client.disconnect()


async def test_hoarders_leave_the_others_their_reserve():
    device, gate = gated()
    limits = Limits(export_bytes=256 * KIB, connection_bytes=256 * KIB, reserved_bytes=8 * KIB)
    async with serving(device, limits=limits) as rig:
        hoarders = [await rig.client() for _ in range(3)]
        for hoarder in hoarders:
            # Half of a write each: it never gets further.
            await hoarder.say(request(WRITE, 0, 200 * KIB, data=bytes(100 * KIB)))
        await trio.testing.wait_all_tasks_blocked()
        assert rig.server._budget.bytes == 200 * KIB
        client = await rig.client()
        for _ in range(3):
            await client.send(READ, 0, 8 * KIB)
        await client.send(READ, 0, 100 * KIB)
        gate.set()
        for _ in range(3):
            assert not (await client.reply())[1].error
        await trio.testing.wait_all_tasks_blocked()
        assert begun(device) == 3
        for hoarder in hoarders:
            await hoarder.stream.aclose()
        assert not (await client.reply())[1].error
        await client.disconnect()


async def test_so_many_clients(caplog):
    async with serving(limits=Limits(connections=2)) as rig:
        first, second = await rig.client(), rig.connect()
        await second.greet()
        for _ in range(10):
            with pytest.raises(Gone):
                await rig.connect().greet()
        await first.disconnect()
        third = await rig.client()
        await second.negotiate_further()
        assert await second.read(0, 512) == bytes(512)
        await third.disconnect()
        await second.disconnect()
    told = [record for record in caplog.records if "refused" in record.message]
    assert 0 < len(told) < 10


async def test_a_negotiation_may_not_take_for_ever():
    async with serving(limits=Limits(negotiation_seconds=0.3)) as rig:
        client = await rig.client()
        silent = rig.connect()
        await silent.receive(18)
        await silent.hung_up()
        chatty = rig.connect()
        await chatty.greet()
        with pytest.raises(Gone):
            await for_ever(chatty.option, 3)
        # Patience with those who are through is endless.
        assert await client.read(0, 512) == bytes(512)
        await client.disconnect()


async def test_who_does_not_listen_to_the_negotiation():
    """It does not wait for ever, either."""
    async with serving(limits=Limits(negotiation_seconds=0.3), name="x" * 4000) as rig:
        client = rig.connect()
        await client.greet()
        with pytest.raises(Gone):
            await for_ever(client.say, option(3))
        await client.stream.aclose()


async def test_farewells_have_an_end():
    async with serving(limits=Limits(farewell_seconds=0.05)) as rig:
        client = await rig.client()
        for _ in range(8):
            await client.send(READ, 0, SIZE)
        await client.send(DISC)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not rig.server._clients
        assert rig.server._budget.bytes == 0
        await client.stream.aclose()


async def test_requests_without_data_count_too():
    device, gate = gated()
    async with serving(device, limits=Limits(connection_bytes=3 * REPLY_BYTES)) as rig:
        client = await rig.client()
        for _ in range(6):
            await client.send(FLUSH)
        await trio.testing.wait_all_tasks_blocked()
        assert begun(device) == 3
        gate.set()
        for _ in range(6):
            await client.reply()
        await client.disconnect()


async def test_out_of_descriptors_means_later(tmp_path: Path, caplog):
    """A host short of descriptors, or clients that leave before they are accepted."""
    failures = [OSError(errno.EMFILE, "Too many open files"), ConnectionAbortedError()]

    class Poor(socket.socket):
        def accept(self):
            if failures:
                raise failures.pop()
            return super().accept()

    with listening(tmp_path / "s") as listener:
        poor = Poor(fileno=os.dup(listener.fileno()))
        poor.setblocking(False)
        async with serving() as rig:
            rig.nursery.start_soon(rig.server._accept, poor, rig.nursery)
            stream = await trio.open_unix_socket(str(tmp_path / "s"))
            with trio.fail_after(5):
                assert (await stream.receive_some(100))[:8] == b"NBDMAGIC"
            await stream.aclose()
            rig.nursery.cancel_scope.cancel()
    assert not failures
    assert "Too many open files" in caplog.text
