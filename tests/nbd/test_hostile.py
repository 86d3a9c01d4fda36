"""Clients that do what they should not: they harm themselves, and nobody else."""

from __future__ import annotations

import random
import struct
from contextlib import suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    EINVAL,
    ENOSPC,
    EXPORT_NAME,
    FLUSH,
    FUA,
    GO,
    NO_HOLE,
    READ,
    SET_META,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    Gone,
    info,
    option,
    queries,
    request,
)
from nbd_rig import SIZE, Rig, memory, serving

from xbd.core.nbd.checks import Checks

FEW = settings(max_examples=settings().max_examples // 3)
"""Each example is a server."""

HELLO = struct.pack(">I", 3)
OPTIONS = (
    option(STRUCTURED)
    + option(SET_META, queries(b"", b"base:allocation"))
    + option(GO, info(b"", 1, 2, 3))
)


async def is_well(rig: Rig) -> None:
    """A decent client gets what it wants."""
    client = await rig.client()
    await client.write(SIZE - 4096, b"w" * 4096)
    assert await client.read(SIZE - 4096, 4096) == b"w" * 4096
    assert (await client.do(BLOCK_STATUS, SIZE - 4096, 4096)).status == [(4096, 0)]
    await client.disconnect()


async def drain(client: Client) -> None:
    """Read until the server hangs up."""
    with suppress(trio.BrokenResourceError):
        while await client.stream.receive_some(1 << 20):
            pass
    await client.stream.aclose()


REQUESTS = (
    request(WRITE, 512, cookie=1, data=b"a" * 512)
    + request(READ, 0, 1024, cookie=2)
    + request(WRITE_ZEROES, 4096, 4096, cookie=3)
    + request(WRITE, 8192, cookie=4, data=b"b" * 100)
    + request(BLOCK_STATUS, 0, SIZE, cookie=5)
    + request(READ, SIZE, 1, cookie=6)
    + request(DISC)
)
STREAM = HELLO + OPTIONS + REQUESTS


@pytest.mark.parametrize("resolvable", [True, False])
@pytest.mark.parametrize("way", ["close", "shut"])
async def test_gone_after_any_byte(resolvable: bool, way: str):
    device = memory(resolvable=resolvable)
    async with serving(device) as rig:
        for length in range(0, len(STREAM), 3):
            begun = length - len(HELLO) - len(OPTIONS)
            if begun > 0:
                client = await rig.client()
                await client.say(REQUESTS[:begun])
            else:
                client = rig.connect()
                await client.say(STREAM[:length])
            if way == "close":
                await client.stream.aclose()
            else:
                await client.stream.send_eof()
                await drain(client)
        with trio.fail_after(20):
            while rig.server._clients:  # the kernel may still be at work for some of them
                await trio.lowlevel.checkpoint()
        assert rig.server._budget.bytes == 0
        await is_well(rig)
        # Whole writes were carried out, halves were not.
        assert device.disk.content[:8292] == bytes(512) + b"a" * 512 + bytes(7168) + b"b" * 100


async def test_one_byte_at_a_time():
    async with serving() as rig:
        client = rig.connect()
        for at in range(len(STREAM)):
            await client.say(STREAM[at : at + 1])
            await trio.lowlevel.checkpoint()
        said = b""
        with suppress(trio.BrokenResourceError):
            while more := await client.stream.receive_some(1 << 16):
                said += more
        assert said.count(b"a" * 512) == 1
        assert b"beyond the end of the export" in said


@pytest.mark.parametrize(
    "bad",
    [
        struct.pack(">IHHQQI", 0x25609514, 0, READ, 1, 0, 512),
        struct.pack(">IHHQQI", 0x13956025, 0, READ, 1, 0, 512),
        request(WRITE, 0, (32 << 20) + 1),
        request(WRITE, 0, 2**32 - 1),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
async def test_what_makes_no_sense_ends_that_connection(bad: bytes, caplog):
    async with serving() as rig:
        other = await rig.client()
        client = await rig.client()
        await client.say(request(READ, 0, 512, cookie=9) + bad + request(READ, 0, 512))
        await client.receive(28 + 512)  # what came before it is answered
        await client.hung_up()
        assert "cut off" in caplog.text
        assert await other.read(0, 512) == bytes(512)
        await other.disconnect()
        await is_well(rig)


async def test_data_of_refused_writes_is_not_taken_for_requests():
    inside = request(WRITE, 0, data=b"evil" * 128)
    async with serving() as rig:
        client = await rig.client()
        for length in (len(inside), 300_000, 1 << 20):
            data = inside * (length // len(inside)) + b"x" * (length % len(inside))
            reply = await client.do(WRITE, SIZE - 100, data=data)
            assert reply.error == ENOSPC
        assert await client.read(0, SIZE) == bytes(SIZE)
        await client.disconnect()


async def test_half_a_write_and_silence_stops_nobody():
    async with serving() as rig:
        silent = await rig.client()
        await silent.say(request(WRITE, 0, 1 << 20, data=b"x" * 1000))
        await is_well(rig)
        assert (await (await rig.client()).read(0, 4096)) == bytes(4096)
        await silent.stream.aclose()


async def test_a_bug_costs_one_client(monkeypatch, caplog):
    problem = Checks.problem

    def buggy(self, kind, flags, offset, length):
        if offset == 12345:
            raise ZeroDivisionError
        return problem(self, kind, flags, offset, length)

    monkeypatch.setattr(Checks, "problem", buggy)
    async with serving() as rig:
        other, client = await rig.client(), await rig.client()
        await client.say(request(READ, 12345, 512))
        await client.hung_up()
        assert await other.read(0, 512) == bytes(512)
        await other.disconnect()
    assert "lost to a bug" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_client_lost_to_a_bug_in_the_negotiation(monkeypatch, caplog):
    from xbd.core.nbd import negotiation

    monkeypatch.setattr(negotiation, "_parse_queries", lambda data: 1 // 0)
    async with serving() as rig:
        client = rig.connect()
        await client.say(HELLO + option(SET_META))
        await client.receive(18)
        await client.hung_up()
        other = await rig.client(structured=False)
        await other.disconnect()
    assert "ZeroDivisionError" in caplog.text


# -- anything at all ----------------------------------------------------------------------------


@FEW
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.builds(
                request,
                st.integers(0, 9),
                st.sampled_from([0, 511, SIZE - 512, SIZE, 2**64 - 1]),
                st.sampled_from([0, 1, 512, 70000, SIZE, 2**31, 2**32 - 1]),
                flags=st.sampled_from([0, 1, 2, 4, 8, 16, 65535]),
            ),
            st.builds(option, st.integers(0, 12), st.binary(max_size=20)),
        ),
        max_size=12,
    ),
    st.sampled_from([b"", HELLO, HELLO + OPTIONS, HELLO + option(EXPORT_NAME)]),
)
async def test_any_bytes(pieces: list[bytes], start: bytes):
    async with serving(memory(resolvable=len(pieces) % 2 == 0)) as rig:
        client = rig.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, client)
            with suppress(Gone, trio.ClosedResourceError):
                await client.say(start + b"".join(pieces))
                await client.stream.send_eof()
        await is_well(rig)


step = st.tuples(
    st.sampled_from([READ, WRITE, WRITE, TRIM, WRITE_ZEROES, FLUSH, CACHE, BLOCK_STATUS]),
    st.integers(0, SIZE + 600),
    st.one_of(st.integers(0, 5000), st.integers(60_000, 300_000)),
    st.sampled_from([0, 0, 0, FUA, NO_HOLE]),
    st.integers(0, 1 << 16),
)


@FEW
@given(
    st.lists(step, max_size=15),
    st.lists(st.integers(1, 9000), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([{}, {"request_alignment": 4096}, {"memory_alignment": 512}]),
    st.booleans(),
)
async def test_a_client_against_a_bytearray(
    script: list[tuple[int, int, int, int, int]],
    sizes: list[int],
    structured: bool,
    alignment: dict[str, int],
    resolvable: bool,
):
    """Every request in odd pieces; answers are what a bytearray and the protocol say."""
    device = memory(geometry=alignment, resolvable=resolvable)
    model = bytearray(SIZE)
    async with serving(device) as rig:
        client = await rig.client(structured=structured)
        whole = client.say

        async def say(data: bytes) -> None:
            at = 0
            for size in sizes * 4:
                await whole(data[at : at + size])
                await trio.lowlevel.checkpoint()
                at += size
            await whole(data[at:])

        client.say = say  # type: ignore[method-assign]
        for kind, offset, length, flags, seed in script:
            await play(client, model, (kind, offset, length, flags), seed)
        client.say = whole  # type: ignore[method-assign]
        assert await client.read(0, SIZE) == model
        await client.disconnect()
    assert device.disk.content == model


async def play(
    client: Client, model: bytearray, asked: tuple[int, int, int, int], seed: int
) -> None:
    kind, offset, length, flags = asked
    data = random.Random(seed).randbytes(length) if kind == WRITE else b""
    reply = await client.do(kind, offset, length, flags=flags, data=data)
    expected = expect(client, *asked)
    assert reply.error == expected, (asked, reply)
    part = slice(offset, offset + length)
    if expected:
        return
    if kind == WRITE:
        model[part] = data
    elif kind == WRITE_ZEROES:
        model[part] = bytes(length)
    elif kind == TRIM and length:
        model[part] = await client.read(offset, length)
    elif kind == READ:
        assert reply.content == model[part]
    elif kind == BLOCK_STATUS:
        assert reply.status is not None
        for size, state in reply.status:
            if state & 2:
                assert not any(model[offset : min(offset + size, part.stop)])
            offset += size


def expect(client: Client, kind: int, offset: int, length: int, flags: int) -> int:
    """The error that the protocol's document asks for."""
    if flags & NO_HOLE and kind != WRITE_ZEROES:
        return EINVAL
    if kind == BLOCK_STATUS and (not client.structured or not length):
        return EINVAL
    if kind != FLUSH and offset + length > SIZE:
        return ENOSPC if kind in (WRITE, WRITE_ZEROES) else EINVAL
    return 0


@FEW
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([READ, WRITE, WRITE_ZEROES]), st.integers()),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([{}, {"request_alignment": 4096}]),
    st.booleans(),
)
async def test_many_clients_at_once_against_a_bytearray(
    script: list[tuple[int, int, int]], alignment: dict[str, int], alone: bool
):
    """Up to 60 requests in flight on 4 connections; no two of them touch the same bytes."""
    piece = 5 * 512
    device = memory(geometry=alignment)
    model = bytearray(random.Random(1).randbytes(SIZE))
    async with serving(device, alone=alone) as rig:
        clients = [await rig.client() for _ in range(4)]
        await clients[0].write(0, bytes(model))
        waiting: list[dict[int, bytes | None]] = [{} for _ in clients]
        for number, (who, kind, seed) in enumerate(script):
            offset = number * piece
            part = slice(offset, offset + piece)
            client = clients[who]
            expected = None
            if kind == WRITE:
                model[part] = random.Random(seed).randbytes(piece)
                cookie = await client.send(WRITE, offset, data=bytes(model[part]))
            else:
                cookie = await client.send(kind, offset, piece)
                if kind == READ:
                    expected = bytes(model[part])
                else:
                    model[part] = bytes(piece)
            waiting[who][cookie] = expected
        for client, cookies in zip(clients, waiting, strict=True):
            while cookies:
                cookie, reply = await client.reply()
                expected = cookies.pop(cookie)
                assert not reply.error
                assert expected is None or reply.content == expected
            await client.disconnect()
    assert device.disk.content == model
