"""What clients ask for during transmission, and what they get."""

from __future__ import annotations

import errno
import os
import random
import struct

import pytest
import trio
import trio.testing
from nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
)
from nbd_rig import SIZE, memory, serving

from xbd.core.driver import (
    BlockStatus,
    Capability,
    DeviceBroken,
    Extent,
    MediaError,
    NoSpace,
)
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice, Wrapper
from xbd.core.nbd import commands

HOLE, ZERO = 1, 2
KIB = 1024


class Calls(Wrapper):
    """Notes what the driver is called for; nothing resolves."""

    def __init__(self, inner: MemoryDevice) -> None:
        super().__init__(inner)
        self.seen: list[object] = []

    async def readv(self, offset, buffers):
        self.seen.append(("read", offset, sum(map(len, buffers))))
        await super().readv(offset, buffers)

    async def writev(self, offset, buffers):
        self.seen.append("write")
        await super().writev(offset, buffers)

    async def flush(self):
        self.seen.append("flush")
        await super().flush()

    async def discard(self, extents):
        self.seen.append("discard")
        await super().discard(extents)

    async def write_zeroes(self, offset, length, *, may_unmap):
        self.seen.append(("zeroes", may_unmap))
        await super().write_zeroes(offset, length, may_unmap=may_unmap)

    def resolve(self, offset, length, *, for_write):
        return None


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


# -- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolvable", [True, False])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("structured", [True, False])
async def test_bytes_come_back(engine: str, resolvable: bool, alone: bool, structured: bool):
    device = memory(SIZE, resolvable=resolvable)
    async with serving(device, alone=alone) as rig:
        client = await rig.client(structured=structured)
        assert client.size == SIZE
        for offset, length in ((0, 512), (512, 4096), (1, 1), (SIZE - 7, 7), (3000, 300 * KIB)):
            data = noise(length, offset)
            await client.write(offset, data)
            assert await client.read(offset, length) == data
            assert device.disk.content[offset : offset + length] == data
        assert await client.read(0, SIZE) == device.disk.content
        await client.disconnect()


@pytest.mark.parametrize("alignment", [{"request_alignment": 4096}, {"memory_alignment": 512}])
async def test_what_is_not_aligned_goes_through_the_driver(alignment):
    device = memory(SIZE, geometry=alignment)
    async with serving(device) as rig:
        client = await rig.client()
        model = bytearray(SIZE)
        for offset, length in ((0, 8192), (100, 5000), (4096, 4096), (SIZE - 1, 1), (511, 2)):
            model[offset : offset + length] = noise(length, offset)
            await client.write(offset, noise(length, offset))
        assert await client.read(0, SIZE) == model
        assert await client.read(77, 5000) == model[77:5077]
        await client.disconnect()


async def test_many_requests_at_once_in_any_order(engine: str):
    async with serving() as rig:
        client = await rig.client()
        cookies = {}
        for block in range(200):
            data = noise(4096, block)
            cookies[await client.send(WRITE, block * 4096, data=data)] = data
        for _ in range(200):
            cookie, reply = await client.reply()
            assert not reply.error
            cookies.pop(cookie)
        assert not cookies
        for block in range(200):
            cookies[await client.send(READ, block * 4096, 4096)] = noise(4096, block)
        for _ in range(200):
            cookie, reply = await client.reply()
            assert reply.content == cookies.pop(cookie)
        await client.disconnect()


async def test_a_slow_request_holds_up_no_other():
    gate = trio.Event()
    slow = Fault(
        operations={"readv"}, trigger=lambda _, offset, __: not offset, wait=gate, error=None
    )
    async with serving(FaultDevice(memory(), slow)) as rig:
        client = await rig.client()
        first = await client.send(READ, 0, 512)
        second = await client.send(READ, 512, 512)
        third = await client.send(FLUSH)
        assert (await client.reply())[0] in (second, third)
        assert (await client.reply())[0] in (second, third)
        gate.set()
        assert (await client.reply())[0] == first
        await client.disconnect()


@pytest.mark.parametrize("flags", [0, DF, FUA, DF | FUA])
async def test_a_read_in_one_piece(flags: int):
    async with serving() as rig:
        client = await rig.client()
        reply = await client.do(READ, 0, SIZE, flags=flags)
        assert reply.content == bytes(SIZE)
        assert reply.chunks == 1
        await client.disconnect()


@pytest.mark.parametrize("structured", [True, False])
async def test_nothing_is_read_and_written_without_complaint(structured: bool):
    async with serving() as rig:
        client = await rig.client(structured=structured)
        for kind in (READ, WRITE, TRIM, WRITE_ZEROES, CACHE):
            for offset in (0, SIZE):
                assert not (await client.do(kind, offset, 0)).error
        await client.disconnect()


async def test_the_largest_request():
    size = 33 << 20
    async with serving(memory(size)) as rig:
        client = await rig.client()
        data = noise(32 << 20)
        await client.write(512, data)
        assert await client.read(512, 32 << 20) == data
        reply = await client.do(READ, 0, (32 << 20) + 1)
        assert reply.error == EINVAL
        await client.disconnect()


async def test_caching_ahead_is_only_advice():
    async with serving(memory()) as rig:
        client = await rig.client()
        for offset, length in ((0, SIZE), (1, 5), (SIZE - 512, 512)):
            assert not (await client.do(CACHE, offset, length)).error
        assert (await client.do(CACHE, SIZE, 1)).error == EINVAL
        await client.disconnect()
    async with serving(memory(resolvable=False)) as rig:
        client = await rig.client()
        assert not (await client.do(CACHE, 0, SIZE)).error
        await client.disconnect()


# -- durability ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "before"),
    [(WRITE, "write"), (TRIM, "discard"), (WRITE_ZEROES, ("zeroes", True))],
)
async def test_force_unit_access_flushes_before_the_answer(kind: int, before: object):
    device = Calls(memory())
    async with serving(device) as rig:
        client = await rig.client()
        data = {"data": bytes(4096)} if kind == WRITE else {"length": 4096}
        assert not (await client.do(kind, 0, **data)).error
        assert device.seen == [before]
        assert not (await client.do(kind, 0, flags=FUA, **data)).error
        assert device.seen == [before, before, "flush"]
        assert not (await client.do(FLUSH)).error
        assert device.seen[3:] == ["flush"]
        await client.disconnect()


async def test_force_unit_access_of_a_resolved_write():
    class Flushes(Calls):
        def resolve(self, offset, length, *, for_write):
            return self.inner.resolve(offset, length, for_write=for_write)

    device = Flushes(memory())
    async with serving(device) as rig:
        client = await rig.client()
        await client.write(0, b"x" * 512, flags=FUA)
        assert device.seen[-1] == "flush"
        assert device.inner.disk.content[:512] == b"x" * 512
        await client.disconnect()


async def test_a_flush_covers_what_other_connections_wrote(engine: str):
    """CAN_MULTI_CONN: the file that a flush syncs is the one that all writes went to."""
    at_flush = []

    class Sync(Wrapper):
        async def flush(self):
            at_flush.append(self.inner.disk.content)
            await super().flush()

    for resolvable in (True, False):
        async with serving(Sync(memory(resolvable=resolvable))) as rig:
            clients = [await rig.client() for _ in range(4)]
            assert all(client.flags & 1 << 8 for client in clients)
            for number, client in enumerate(clients):
                await client.write(number * 4096, bytes([number + 1]) * 4096)
            assert not (await clients[0].do(FLUSH)).error
            assert at_flush.pop()[: 4 * 4096] == b"".join(
                bytes([number + 1]) * 4096 for number in range(4)
            )
            for client in clients:
                assert await client.read(0, 512) == b"\1" * 512
                await client.disconnect()


# -- zeroes, holes ------------------------------------------------------------------------------


async def test_zeroes_and_discards():
    device = Calls(memory())
    async with serving(device) as rig:
        client = await rig.client()
        await client.write(0, b"x" * SIZE)
        device.seen.clear()
        assert not (await client.do(WRITE_ZEROES, 512, 4096)).error
        assert not (await client.do(WRITE_ZEROES, 8192, 4096, flags=NO_HOLE | FUA)).error
        assert not (await client.do(TRIM, 65536, 4096)).error
        assert device.seen == [("zeroes", True), ("zeroes", False), "flush", "discard"]
        assert await client.read(512, 4096) == bytes(4096)
        assert await client.read(8192, 4096) == bytes(4096)
        assert await client.read(4608, 3584) == b"x" * 3584
        await client.disconnect()


async def test_requests_without_data_may_be_longer_than_those_with():
    size = 8 << 30
    zeroed = []

    class Zeroes(Wrapper):
        async def write_zeroes(self, offset, length, *, may_unmap):
            zeroed.append((offset, length))

    async with serving(Zeroes(memory(size))) as rig:
        client = await rig.client()
        most = 2**32 - 512
        await client.write(most + 4096, b"x" * 512)
        hole = HOLE | ZERO
        assert (await client.do(BLOCK_STATUS, 0, most)).status == [(most, hole)]
        reply = await client.do(BLOCK_STATUS, 8192, most)
        assert reply.status == [(2**32 - 8192, hole), (4096, 0), (3584, hole)]
        assert not (await client.do(WRITE_ZEROES, 4096, most)).error
        assert zeroed == [(4096, most)]
        await client.disconnect()


async def test_block_status():
    async with serving() as rig:
        client = await rig.client()
        await client.write(65536, b"x" * 8192)
        hole, data = HOLE | ZERO, 0
        status = (await client.do(BLOCK_STATUS, 0, SIZE)).status
        assert status == [(65536, hole), (8192, data), (SIZE - 73728, hole)]
        status = (await client.do(BLOCK_STATUS, 0, SIZE, flags=REQ_ONE)).status
        assert status == [(65536, hole)]
        status = (await client.do(BLOCK_STATUS, 65537, 100)).status
        assert status == [(100, data)]
        status = (await client.do(BLOCK_STATUS, 65000, 2000, flags=REQ_ONE)).status
        assert status == [(536, hole)]
        status = (await client.do(BLOCK_STATUS, SIZE - 1, 1)).status
        assert status == [(1, hole)]
        assert (await client.do(BLOCK_STATUS, 0, 0)).error == EINVAL
        assert (await client.do(BLOCK_STATUS, SIZE - 1, 2)).error == EINVAL
        await client.disconnect()


class Speckled(Wrapper):
    """Says of every second block that it is a hole, block by block."""

    asked = 0

    async def block_status(self, offset, length):
        self.asked += 1
        hole = bool(offset // 4096 % 2)
        return [BlockStatus(length=4096 - offset % 4096, hole=hole, zero=hole)]


async def test_status_replies_are_bounded(monkeypatch):
    monkeypatch.setattr(commands, "MAX_DESCRIPTORS", 10)
    monkeypatch.setattr(commands, "_STATUS_PIECE", 16 * KIB)
    device = Speckled(memory(resolvable=False))
    async with serving(device) as rig:
        client = await rig.client()
        status = (await client.do(BLOCK_STATUS, 0, SIZE)).status
        assert status == [(4096, (HOLE | ZERO) * (n % 2)) for n in range(10)]
        assert device.asked < 30
        status = (await client.do(BLOCK_STATUS, 4096, SIZE - 4096, flags=REQ_ONE)).status
        assert status == [(4096, HOLE | ZERO)]
        await client.disconnect()


async def test_status_needs_its_context():
    for agreed in ({"structured": False}, {"allocation": False}):
        async with serving() as rig:
            client = await rig.client(**agreed)
            assert (await client.do(BLOCK_STATUS, 0, 512)).error == EINVAL
            await client.disconnect()


async def test_long_reads_that_the_driver_serves_come_with_holes():
    device = Calls(memory())
    async with serving(device) as rig:
        client = await rig.client()
        await client.write(64 * KIB, b"x" * 4096)
        device.seen.clear()
        reply = await client.do(READ, 512, 256 * KIB)
        assert reply.holes == [(512, 64 * KIB - 512), (68 * KIB, 188 * KIB + 512)]
        assert reply.content == bytes(64 * KIB - 512) + b"x" * 4096 + bytes(188 * KIB + 512)
        assert device.seen == [("read", 64 * KIB, 4096)]
        await client.disconnect()


@pytest.mark.parametrize(
    ("how", "length", "flags"),
    [({}, 256 * KIB, DF), ({"structured": False}, 256 * KIB, 0), ({}, 32 * KIB, 0)],
)
async def test_reads_without_holes(how: dict[str, bool], length: int, flags: int):
    device = Calls(memory())
    async with serving(device) as rig:
        client = await rig.client(**how)
        reply = await client.do(READ, 0, length, flags=flags)
        assert reply.content == bytes(length)
        assert not reply.holes
        assert device.seen == [("read", 0, length)]
        await client.disconnect()


async def test_too_many_holes_are_read_instead():
    async with serving(Speckled(memory(resolvable=False))) as rig:
        client = await rig.client()
        reply = await client.do(READ, 0, SIZE)
        assert reply.content == bytes(SIZE)
        assert not reply.holes
        await client.disconnect()


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags", "error"),
    [
        (READ, SIZE, 1, 0, EINVAL),
        (READ, SIZE - 511, 512, 0, EINVAL),
        (READ, 2**64 - 1, 2, 0, EINVAL),
        (READ, 0, 2**32 - 1, 0, EINVAL),
        (READ, 0, 512, NO_HOLE, EINVAL),
        (READ, 0, 512, 1 << 15, EINVAL),
        (WRITE, SIZE, 512, 0, ENOSPC),
        (WRITE, SIZE - 511, 512, 0, ENOSPC),
        (WRITE, 2**64 - 512, 512, 0, ENOSPC),
        (WRITE, 0, 512, DF, EINVAL),
        (WRITE, 0, 512, 1 << 5, EINVAL),
        (TRIM, SIZE - 511, 512, 0, EINVAL),
        (TRIM, 0, 512, NO_HOLE, EINVAL),
        (WRITE_ZEROES, SIZE, 512, 0, ENOSPC),
        (WRITE_ZEROES, 0, 512, FAST_ZERO, EINVAL),
        (CACHE, 0, 512, DF, EINVAL),
        (FLUSH, 0, 0, NO_HOLE, EINVAL),
        (BLOCK_STATUS, 0, 512, DF, EINVAL),
        (8, 0, 512, 0, EINVAL),
        (65535, 0, 512, 0, EINVAL),
    ],
)
async def test_refused_requests_harm_nothing(
    structured: bool, kind: int, offset: int, length: int, flags: int, error: int
):
    device = memory()
    async with serving(device) as rig:
        client = await rig.client(structured=structured)
        data = b"y" * length if kind == WRITE else b""
        reply = await client.do(kind, offset, length, flags=flags, data=data)
        assert reply.error == error
        assert bool(reply.text) == structured
        assert device.disk.content == bytes(SIZE)
        await client.write(0, b"z" * 512)
        assert await client.read(0, 512) == b"z" * 512
        await client.disconnect()


async def test_flags_of_structured_replies_need_them():
    async with serving() as rig:
        client = await rig.client(structured=False)
        assert (await client.do(READ, 0, 512, flags=DF)).error == EINVAL
        await client.disconnect()


async def test_a_flushs_range_is_not_looked_at():
    async with serving() as rig:
        client = await rig.client()
        assert not (await client.do(FLUSH, 2**63, 2**31)).error
        await client.disconnect()


@pytest.mark.parametrize("kind", [WRITE, TRIM, WRITE_ZEROES])
async def test_a_read_only_disk(kind: int):
    device = memory(writable=False)
    async with serving(device) as rig:
        client = await rig.client()
        assert client.flags & 2
        data = b"x" * 512 if kind == WRITE else b""
        assert (await client.do(kind, 0, 512, data=data)).error == EPERM
        assert (await client.do(READ, 0, 512, flags=FUA)).error == EINVAL
        assert not (await client.do(FLUSH)).error
        assert await client.read(0, 512) == bytes(512)
        await client.disconnect()


async def test_a_disk_without_discard():
    async with serving(memory(capabilities=Capability.WRITE)) as rig:
        client = await rig.client()
        assert (await client.do(TRIM, 0, 512)).error == EINVAL
        await client.write(0, b"x" * 512)
        assert not (await client.do(WRITE_ZEROES, 0, 512)).error
        assert await client.read(0, 512) == bytes(512)
        await client.disconnect()


# -- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (MediaError("/secret/path: bad"), EIO),
        (NoSpace("/secret/path: full"), ENOSPC),
        (MediaError("/secret/path: full", errno=errno.EDQUOT), ENOSPC),
        (MediaError("/secret/path: no", errno=errno.EROFS), EPERM),
        (ZeroDivisionError("/secret/path"), EIO),
    ],
)
async def test_the_drivers_errors(structured: bool, raised: Exception, error: int, caplog):
    fault = Fault(error=lambda: raised, operations={"readv", "writev", "flush"})
    device = FaultDevice(memory(), fault)
    async with serving(device) as rig:
        client = await rig.client(structured=structured)
        for kind, more in ((READ, {"length": 512}), (WRITE, {"data": bytes(512)}), (FLUSH, {})):
            reply = await client.do(kind, 0, **more)
            assert reply.error == error
            assert b"secret" not in reply.text
        device.faults.clear()
        assert await client.read(0, 512) == bytes(512)
        await client.disconnect()
        assert "/secret/path" in caplog.text
        rig.access.bugs = 0


async def test_what_an_extent_can_not_deliver_the_driver_is_asked_for(engine: str):
    """A host file that was cut off: the short transfer is tried again and then told."""
    device = memory()
    async with serving(device) as rig:
        client = await rig.client()
        assert await client.read(0, 512) == bytes(512)
        inner, retried = device.readv, []

        async def readv(offset, buffers):
            retried.append(offset)
            if offset:
                raise MediaError("cut off")
            await inner(offset, buffers)

        device.readv = readv  # type: ignore[method-assign]
        os.ftruncate(device.disk.fd, 4096)
        assert await client.read(0, 512) == bytes(512)
        assert (await client.do(READ, 8192, 512)).error == EIO
        assert retried == [8192]
        await client.disconnect()


async def test_a_broken_disk_ends_the_server():
    device = FaultDevice(memory(), Fault(operations={"readv"}, error=lambda: DeviceBroken("gone")))

    async def use() -> None:
        async with serving(device) as rig:
            client = await rig.client()
            other = await rig.client()
            assert (await client.do(READ, 0, 512)).error == EIO
            await client.hung_up()
            await other.hung_up()

    with pytest.raises(ExceptionGroup) as caught:
        await use()
    assert caught.group_contains(DeviceBroken, match="gone")


# -- the end ------------------------------------------------------------------------------------


async def test_what_was_asked_before_good_bye_is_answered():
    gate = trio.Event()
    device = FaultDevice(memory(), Fault(operations={"writev"}, wait=gate, error=None))
    async with serving(device) as rig:
        client = await rig.client()
        cookie = await client.send(WRITE, 0, data=b"x" * 512)
        await client.send(DISC)
        await client.send(WRITE, 0, data=b"y" * 512)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
        assert (await client.reply())[0] == cookie
        await client.hung_up()
        assert device.inner.disk.content[:512] == b"x" * 512


async def test_a_client_that_only_stops_talking_gets_its_answers():
    gate = trio.Event()
    device = FaultDevice(memory(), Fault(operations={"readv"}, wait=gate, error=None))
    async with serving(device) as rig:
        client = await rig.client()
        await client.send(READ, 0, 512)
        await client.stream.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
        _, reply = await client.reply()
        assert reply.content == bytes(512)
        await client.hung_up()


async def test_requests_behind_the_negotiation_in_one_go():
    """With EXPORT_NAME clients need not wait for the answer."""
    async with serving() as rig:
        client = rig.connect()
        request = struct.pack(">IHHQQI", 0x25609513, 0, READ, 7, 0, 512)
        name = struct.pack(">8sII", b"IHAVEOPT", 1, 0)
        await client.say(struct.pack(">I", 3) + name + request + request[:10])
        await client.receive(18 + 10)
        assert await client.receive(16) == struct.pack(">IIQ", 0x67446698, 0, 7)
        assert await client.receive(512) == bytes(512)
        await client.say(request[10:])
        await client.receive(16 + 512)
        await client.say(struct.pack(">IHHQQI", 0x25609513, 0, DISC, 0, 0, 0))
        await client.hung_up()


async def test_discards_reach_the_driver_as_whole_granules():
    device = memory(geometry={"discard_granularity": 65536})
    seen: list[Extent] = []
    inner = device.discard

    async def discard(extents):
        seen.extend(extents)
        await inner(extents)

    device.discard = discard  # type: ignore[method-assign]
    async with serving(device) as rig:
        client: Client = await rig.client()
        assert not (await client.do(TRIM, 512, 4096)).error
        assert not (await client.do(TRIM, 512, 256 * KIB)).error
        assert seen == [Extent(offset=65536, length=3 * 65536)]
        await client.disconnect()
