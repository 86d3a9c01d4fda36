"""What an NBD client's requests need the driver for: places, and many requests at a time."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import trio
import trio.testing
from nbd_client import DF, EIO, FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES, Client
from nbd_rig import SECONDS, SIZE, Rig, serving
from placing_device import UNIT, Placing

from xbd.core.driver import (
    Concurrency,
    DeviceAccess,
    DeviceBroken,
    DiskSpec,
    DriverError,
    Geometry,
    MediaError,
    open_disk,
)
from xbd.core.driver.testing import MemoryDevice
from xbd.core.nbd import Export, NbdServer, serve_nbd
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2.create import create
from xbd.drivers.qcow2.create_options import CreateOptions

PAGE = 4 * KIB


def placing() -> Placing:
    return Placing(SIZE, Geometry(size=SIZE, request_alignment=512))


class Batching(MemoryDevice):
    """Takes many requests at a time, and resolves nothing."""

    batching = True

    def __init__(self) -> None:
        geometry = Geometry(size=4 * MIB, request_alignment=512)
        super().__init__(4 * MIB, geometry=geometry, resolvable=False)
        self.calls: list[tuple[str, list[int]]] = []
        self.bad: set[int] = set()
        """Offsets of requests that fail alone."""
        self.error: Exception | None = None

    async def read_many(self, requests):
        await self._carry_out("read", requests, self.readv)

    async def write_many(self, requests):
        await self._carry_out("write", requests, self.writev)

    async def _carry_out(self, what, requests, move) -> None:
        self.calls.append((what, [request.offset for request in requests]))
        if self.error is not None:
            raise self.error
        for request in requests:
            if request.offset in self.bad:
                request.error = MediaError("a bad sector")
            else:
                await move(request.offset, request.buffers)


async def answers(client: Client, count: int) -> dict[int, int]:
    """The errors in so many replies, by cookie."""
    told = {}
    for _ in range(count):
        cookie, reply = await client.reply()
        told[cookie] = reply.error
    return told


def parallel(device: MemoryDevice) -> DeviceAccess:
    return DeviceAccess(
        device, device_id="the disk", concurrency=Concurrency.PARALLEL, writable=True
    )


async def being_placed(rig: Rig, device: Placing) -> Client:
    """Who asked for a write whose place is not found before `device.held` is set."""
    device.held = trio.Event()
    client = await rig.client()
    await client.send(WRITE, 0, data=b"1" * PAGE)
    await trio.testing.wait_all_tasks_blocked()
    assert device.calls == [[(0, PAGE)]]
    return client


# -- places ---------------------------------------------------------------------------------


async def test_what_can_be_placed_is_written_past_the_driver(engine: str):
    device = placing()
    async with serving(device) as rig:
        client = await rig.client()
        for content in (b"w", b"v"):
            for unit in range(9):
                await client.send(WRITE, unit * UNIT, data=content * PAGE)
            assert not any((await answers(client, 9)).values())
            for unit in range(9):
                assert await client.read(unit * UNIT, PAGE) == content * PAGE
                assert os.pread(device.disk.fd, PAGE, unit * UNIT) == content * PAGE
        placed = sorted(offset for call in device.calls for offset, _ in call)
        assert placed == sorted(
            [unit * UNIT for unit in range(9)] + [unit * UNIT for unit in (2, 5, 8)]
        )
        assert sorted(device.written) == sorted(2 * [2 * UNIT, 5 * UNIT, 8 * UNIT])
        await client.disconnect()


async def test_writes_that_come_meanwhile_are_placed_together():
    device = placing()
    async with serving(device) as rig:
        client = await being_placed(rig, device)
        for unit in (3, 4, 6):
            await client.send(WRITE, unit * UNIT, data=b"2" * PAGE)
        await trio.testing.wait_all_tasks_blocked()
        assert len(device.calls) == 1
        device.held.set()
        assert not any((await answers(client, 4)).values())
        assert device.calls[1:] == [[(unit * UNIT, PAGE) for unit in (3, 4, 6)]]
        assert not device.written
        await client.disconnect()


async def test_where_placing_fails_the_driver_writes():
    device = placing()
    device.error = DriverError("full", errno=28)
    async with serving(device) as rig:
        client = await rig.client()
        await client.write(0, b"1" * PAGE)
        assert device.written == [0]
        device.error = None
        await client.write(0, b"2" * PAGE)
        assert device.written == [0]
        assert os.pread(device.disk.fd, PAGE, 0) == b"2" * PAGE
        await client.disconnect()


async def test_a_disk_that_breaks_in_placing_is_told_by_writing():
    class Breaking(Placing):
        async def writev(self, offset, buffers):
            raise DeviceBroken("gone")

    device = Breaking()
    device.error = DeviceBroken("gone")
    with pytest.RaisesGroup(pytest.RaisesExc(DeviceBroken, match="gone"), flatten_subgroups=True):
        async with serving(device) as rig:
            client = await rig.client()
            assert (await client.do(WRITE, 0, data=b"1" * PAGE)).error == EIO
            await client.hung_up()


@pytest.mark.parametrize(("offset", "flags"), [(0, FUA), (100, 0)])
async def test_what_is_not_placed(offset: int, flags: int):
    """What has to be durable is the driver's, and so is what does not fit its alignment."""
    device = placing()
    async with serving(device) as rig:
        client = await rig.client()
        await client.write(offset, b"1" * PAGE, flags=flags)
        assert not device.calls
        assert device.written
        assert await client.read(offset, PAGE) == b"1" * PAGE
        await client.disconnect()


async def test_who_leaves_while_places_are_sought_has_written():
    device = placing()
    async with serving(device) as rig:
        client = await being_placed(rig, device)
        await client.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        device.held.set()
    assert os.pread(device.disk.fd, PAGE, 0) == b"1" * PAGE


async def test_a_stop_waits_for_places(tmp_path: Path):
    device = placing()
    device.held = trio.Event()
    access = parallel(device)
    path = tmp_path / "socket"
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_nbd, access, path)
            client = await Client(await trio.open_unix_socket(path)).negotiate()
            await client.send(WRITE, 0, data=b"1" * PAGE)
            await trio.testing.wait_all_tasks_blocked()
            server.stop()
            await trio.testing.wait_all_tasks_blocked()
            device.held.set()
            assert list((await answers(client, 1)).values()) == [0]
            await client.hung_up()
    assert os.pread(device.disk.fd, PAGE, 0) == b"1" * PAGE
    await access.aclose()


async def test_nothing_is_left_when_places_are_sought_no_more():
    device = placing()
    access = parallel(device)
    server = NbdServer(Export(access=access))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, [])
        client = await being_placed(Rig(server, access, nursery), device)
        nursery.cancel_scope.cancel()
    assert server._budget.bytes == 0
    assert server._poller.tasks == 0
    await client.stream.aclose()
    await access.aclose()


async def test_nothing_is_placed_behind_an_end_that_moves():
    """The disk shrinks while a write waits for its place."""
    device = placing()
    async with serving(device) as rig:
        client = await being_placed(rig, device)
        last = await client.send(WRITE, SIZE - PAGE, data=b"3" * PAGE)
        await trio.testing.wait_all_tasks_blocked()
        rig.nursery.start_soon(rig.access.resize, SIZE // 2)
        await trio.testing.wait_all_tasks_blocked()
        assert rig.access.geometry.size == SIZE  # placing is a kind of writing
        device.held.set()
        errors = await answers(client, 2)
        assert errors.pop(last)
        assert list(errors.values()) == [0]
        assert rig.access.geometry.size == SIZE // 2
        await client.disconnect()
    assert device.disk.content == b"1" * PAGE + bytes(SIZE // 2 - PAGE)


# -- many at a time -------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
async def test_what_comes_together_is_one_call(structured: bool):
    device = Batching()
    async with serving(device) as rig:
        client = await rig.client(structured=structured)
        offsets = [number * UNIT for number in (5, 2, 9)]
        await together(client, [(WRITE, offset, b"%d" % offset * 512) for offset in offsets])
        assert not any((await answers(client, 3)).values())
        await together(client, [(READ, offset, 1024) for offset in offsets])
        for _ in offsets:
            _, reply = await client.reply()
            [(offset, data)] = reply.data.items()
            assert data == (b"%d" % offset * 512)[:1024]
        assert device.calls == [("write", offsets), ("read", offsets)]
        await client.disconnect()


async def together(client: Client, requests: list[tuple[int, int, bytes | int]]) -> list[int]:
    """Send requests so that the server sees all of them at once; their cookies."""
    whole, say = bytearray(), client.say

    async def collect(data: bytes) -> None:
        whole.extend(data)

    client.say = collect  # type: ignore[method-assign]
    cookies = [
        await client.send(kind, offset, **({"data": what} if kind == WRITE else {"length": what}))
        for kind, offset, what in requests
    ]
    client.say = say  # type: ignore[method-assign]
    await client.say(bytes(whole))
    return cookies


async def test_what_fails_fails_alone():
    device = Batching()
    device.bad = {UNIT}
    async with serving(device) as rig:
        client = await rig.client()
        for kind, what in ((WRITE, b"x" * 512), (READ, 512)):
            cookies = await together(client, [(kind, n * UNIT, what) for n in range(3)])
            told = await answers(client, 3)
            assert [told[cookie] for cookie in cookies] == [0, EIO, 0]
        await client.disconnect()


async def test_what_the_call_raises_is_the_failure_of_all():
    device = Batching()
    device.error = MediaError("dust")
    async with serving(device) as rig:
        client = await rig.client()
        for kind, what in ((WRITE, b"x" * 512), (READ, 512)):
            await together(client, [(kind, n * UNIT, what) for n in range(3)])
            assert list((await answers(client, 3)).values()) == [EIO] * 3
        await client.disconnect()


async def test_a_disk_that_breaks_in_a_call_for_many_ends_the_server():
    device = Batching()
    device.error = DeviceBroken("gone")
    with pytest.RaisesGroup(pytest.RaisesExc(DeviceBroken, match="gone"), flatten_subgroups=True):
        async with serving(device) as rig:
            client = await rig.client()
            assert (await client.do(READ, 0, 512)).error == EIO
            await client.hung_up()


async def test_a_call_has_not_too_much_to_do():
    device = Batching()
    async with serving(device) as rig:
        client = await rig.client()
        size = 384 * KIB
        await together(client, [(WRITE, number * size, b"x" * size) for number in range(8)])
        assert not any((await answers(client, 8)).values())
        assert sorted(offset for _, call in device.calls for offset in call) == [
            number * size for number in range(8)
        ]
        assert all(len(call) <= 2 for _, call in device.calls)
        assert device.disk.content[: 8 * size] == b"x" * 8 * size
        await client.disconnect()


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags"),
    [
        (WRITE, 0, PAGE, FUA),
        (WRITE, 100, PAGE, 0),
        (READ, 100, PAGE, 0),
        (READ, 0, UNIT, 0),  # it asks for holes first
    ],
)
async def test_what_is_asked_for_alone(kind: int, offset: int, length: int, flags: int):
    device = Batching()
    async with serving(device) as rig:
        client = await rig.client()
        what = {"data": b"x" * length} if kind == WRITE else {"length": length}
        assert not (await client.do(kind, offset, flags=flags, **what)).error
        assert not device.calls
        await client.disconnect()


async def test_a_long_read_without_holes_goes_with_others():
    device = Batching()
    async with serving(device) as rig:
        client = await rig.client()
        assert await client.read(0, UNIT, flags=DF) == bytes(UNIT)
        assert device.calls == [("read", [0])]
        await client.disconnect()


# -- all of it, on an image -----------------------------------------------------------------


@pytest.mark.parametrize(("alone", "compress"), [(False, False), (True, False), (True, True)])
async def test_a_qcow2_image_in_use(engine: str, alone: bool, compress: bool, tmp_path: Path):
    """First writes, trims, zeroes and flushes side by side, while the disk grows."""
    size, part, image = 8 * MIB, MIB, tmp_path / "disk.qcow2"
    create(image, size, CreateOptions(cluster_size=4 * KIB))
    dice = random.Random(11)
    model = bytearray(2 * size)

    async def use(client: Client, number: int) -> None:
        for _ in range(60):
            unit = dice.choice([1, 512, 4096])
            offset = number * part + unit * dice.randrange(part // unit - 64)
            length = unit * dice.randint(1, 64)
            kind = dice.choice([READ, WRITE, WRITE, WRITE, TRIM, WRITE_ZEROES, FLUSH])
            if kind == WRITE:
                data = dice.randbytes(length)
                await client.write(offset, data, flags=dice.choice([0, 0, 0, FUA]))
                model[offset : offset + length] = data
            elif kind == READ:
                assert await client.read(offset, length) == model[offset : offset + length]
            elif kind == FLUSH:
                assert not (await client.do(FLUSH)).error
            else:
                assert not (await client.do(kind, offset, length)).error
                if kind == TRIM:  # as it likes: all, nothing, or whole clusters
                    model[offset : offset + length] = await client.read(offset, length)
                else:
                    model[offset : offset + length] = bytes(length)

    async def change(access: DeviceAccess) -> None:
        for eighths in range(9, 17):
            await access.resize(eighths * MIB)
        await access.create_snapshot("as it was then")

    spec = DiskSpec.parse(f"qcow2:{image}?compress={'yes' if compress else 'no'}&discard=unmap")
    async with (
        open_disk(spec, device_id="the disk", writable=True) as access,
        serving(access, alone=alone) as rig,
        trio.open_nursery() as nursery,
    ):
        for number in range(8):
            nursery.start_soon(use, await rig.client(), number)
        nursery.start_soon(change, access)
    if shutil.which("qemu-img") is not None:
        raw = tmp_path / "disk.img"
        await trio.run_process(["qemu-img", "check", "-q", image])
        await trio.run_process(["qemu-img", "convert", "-O", "raw", image, raw])
        assert raw.read_bytes() == model
