"""Ending in order: nothing that was answered or taken is lost, nobody is waited for for ever."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from nbd_client import READ, WRITE, Gone, request
from nbd_rig import SIZE, Rig, memory, serving

from xbd.core.driver import Concurrency, DeviceAccess
from xbd.core.driver.testing import Fault, FaultDevice
from xbd.core.nbd import Export, Limits, NbdServer


def gated() -> tuple[FaultDevice, trio.Event]:
    gate = trio.Event()
    return FaultDevice(memory(), Fault(operations={"writev"}, wait=gate, error=None)), gate


async def test_what_was_taken_is_answered_and_nothing_more_is_taken():
    device, gate = gated()
    async with serving(device) as rig:
        client, idle, negotiating = await rig.client(), await rig.client(), rig.connect()
        await negotiating.greet()
        cookies = {await client.send(WRITE, n * 512, data=b"x" * 512) for n in range(3)}
        await trio.testing.wait_all_tasks_blocked()
        rig.server.stop()
        await negotiating.hung_up()
        await idle.hung_up()
        await client.say(request(WRITE, 4096, cookie=1, data=b"late" * 128))
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
        for _ in range(3):
            cookie, reply = await client.reply()
            assert not reply.error
            cookies.remove(cookie)
        await client.hung_up()
        assert device.inner.disk.content[:1536] == b"x" * 1536
        assert device.inner.disk.content[4096:] == bytes(SIZE - 4096)
        with pytest.raises(Gone):
            await rig.connect().negotiate()


async def test_half_a_write_is_not_waited_for(engine: str):
    async with serving() as rig:
        client = await rig.client()
        await client.say(request(WRITE, 0, 1 << 20, data=b"x" * 1000))
        await trio.testing.wait_all_tasks_blocked()
        assert rig.server._budget.bytes == 1 << 20
        rig.server.stop()
        await client.hung_up()


async def test_who_does_not_read_is_waited_for_a_moment():
    async with serving(limits=Limits(farewell_seconds=0.1)) as rig:
        client = await rig.client()
        for _ in range(8):
            await client.send(READ, 0, SIZE)
        await trio.testing.wait_all_tasks_blocked()
        rig.server.stop()


@pytest.mark.parametrize("resolvable", [True, False])
async def test_cancelled_in_the_middle(engine: str, resolvable: bool):
    """As on a second signal: at once, and yet no buffer is given back while it is in use."""
    device = memory(8 << 20, resolvable=resolvable)
    access = DeviceAccess(
        device, device_id="the disk", concurrency=Concurrency.PARALLEL, writable=True
    )
    server = NbdServer(Export(access=access))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, [])
        rig = Rig(server, access, nursery)
        clients = [await rig.client() for _ in range(3)]
        for client in clients:
            for number in range(100):
                await client.send(WRITE, number * 65536, data=bytes([number]) * 65536)
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert server._budget.bytes == 0
    assert not server._direct._in_flight
    assert server._poller.tasks == 0
    for client in clients:
        await client.stream.aclose()
    await access.aclose()


async def test_the_last_one_is_told_of():
    left = []
    async with serving() as rig:
        rig.server.on_last_left = lambda: left.append(True)
        await rig.connect().stream.aclose()
        shy = rig.connect()
        await shy.greet()
        await shy.stream.aclose()
        first, second = await rig.client(), await rig.client()
        await first.disconnect()
        await trio.testing.wait_all_tasks_blocked()
        assert not left
        await second.disconnect()
        await trio.testing.wait_all_tasks_blocked()
        assert left == [True]
