"""Guests that want time, memory, mappings or log lines: all of it has a bound."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import trio
import trio.testing
from data_paths import NATIVE
from hostile_world import ATTACKER_PAGES, MODES, U32, until

from xbd.core.blkif import constants, encode
from xbd.core.datapath import Features, GrantMode
from xbd.core.datapath.native.connection import NativeConnection
from xbd.core.datapath.pages.budget import RESERVE
from xbd.core.datapath.pages.copied import MAX_BOUNCE_PAGES
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice
from xbd.core.units import KIB, MIB, PAGE_SIZE

pytestmark = [pytest.mark.alone, pytest.mark.slow]

READ, WRITE = constants.READ, constants.WRITE


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


async def latencies(field, count: int = 20) -> list[float]:
    """How long the victim waits for 4 KiB, each time."""
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        await field.victim.read(0, 4 * KIB)
        found.append(time.perf_counter() - begin)
    return found


async def test_events_without_requests_cost_few_wake_ups(python_field):
    """The ring backs off: fifty looks a second, whatever the guest does."""
    field = python_field
    async with field.attacker() as attacker:
        server = attacker.disk.connection._servers[0]
        looks = 0
        serve = server.serve

        def counting() -> bool:
            nonlocal looks
            looks += 1
            return serve()

        server.__class__.serve, original = (
            (lambda self: counting() if self is server else original(self)),
            server.__class__.serve,
        )
        try:
            async with trio.open_nursery() as nursery:

                async def storm() -> None:
                    while True:
                        attacker.ring.port.notify()
                        await trio.lowlevel.checkpoint()

                nursery.start_soon(storm)
                begin = time.perf_counter()
                await latencies(field, 100)
                while time.perf_counter() - begin < 1:
                    await field.victim_is_well()
                seconds = time.perf_counter() - begin
                nursery.cancel_scope.cancel()
        finally:
            server.__class__.serve = original
        assert looks < 16 + 40 + 60 * seconds
        await attacker.must_serve()


def sleeps_of_io_threads() -> int:
    """How often they went to sleep, all of them together."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text() == "xbd-io\n":
            status = (task / "status").read_text()
            total += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


@pytest.mark.parametrize("threads", [NATIVE], indirect=True)
async def test_events_without_requests_cost_few_wake_ups_in_c(field):
    async with field.attacker() as attacker:
        notify = attacker.ring.port.notify
        before, begin = sleeps_of_io_threads(), time.perf_counter()
        for _ in range(300_000):
            notify()
        sleeps, seconds = sleeps_of_io_threads() - before, time.perf_counter() - begin
        assert sleeps < 16 + 40 + 150 * seconds
        assert seconds > 0.1
        await attacker.must_serve()
        await field.victim_is_well()


async def test_an_index_that_moves_to_and_fro_costs_few_wake_ups(python_field):
    """Between the look and the check before sleep there seems to be work, and there is none."""
    field = python_field
    async with field.attacker() as attacker:
        ring = attacker.disk.connection._servers[0].ring
        looks = 0
        take, final_check = ring.take, ring.final_check

        class Restless:
            def __getattr__(self, name):
                return getattr(ring, name)

            def take(self, limit=None):
                nonlocal looks
                looks += 1
                attacker.ring.words[0] = attacker.ring.prod
                return take(limit)

            def final_check(self):
                attacker.ring.words[0] = attacker.ring.prod + 1
                return final_check()

        attacker.disk.connection._servers[0].ring = Restless()
        attacker.ring.port.notify()
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.5:
            await field.victim_is_well()
        seconds = time.perf_counter() - begin
        attacker.disk.connection._servers[0].ring = ring
        attacker.ring.words[0] = attacker.ring.prod
        assert looks < 16 + 40 + 60 * seconds


@pytest.mark.parametrize("mode", MODES)
async def test_full_rings_of_the_longest_requests_leave_the_others_their_turn(field, mode):
    """Four queues, each kept full of 1 MiB requests in pieces of 512 bytes and whole pages."""
    async with (
        field.attacker(mode=mode, order=4, queues=4, size=2 * MIB) as attacker,
        trio.open_nursery() as nursery,
    ):
        data = attacker.pages(256)
        (table,) = attacker.pages(1)
        packed = encode.pack_indirect_page([(ref, 0, 7) for ref in data])
        attacker.guest.page(table)[: len(packed)] = packed

        async def keep_full(ring) -> None:
            number = 0
            while True:
                while (ring.prod - ring.cons) & U32 < ring.entries:
                    number += 1
                    entry = encode.encode_indirect(attacker.abi, READ, number, 0, 256, [table])
                    ring.put(entry)
                ring.publish()
                await trio.lowlevel.checkpoint()
                ring.answers()
                ring.words[3] = ring.cons + 1 & U32

        for ring in attacker.rings:
            nursery.start_soon(keep_full, ring)
        waits = await latencies(field, 30)
        print(f"{mode.value}: median {statistics.median(waits):.4f} s, worst {max(waits):.4f} s")
        nursery.cancel_scope.cancel()
        assert statistics.median(waits) < (0.25 if field.threads is None else 0.5)
        assert max(waits) < 5


def log_limit_of(connection):
    if isinstance(connection, NativeConnection):
        return connection._upcalls.log_limit
    return connection._servers[0].log_limit


async def test_bad_requests_by_the_thousand_are_few_lines(field):
    async with field.attacker(order=4) as attacker:
        ring = attacker.ring
        sent = 0
        begin = time.perf_counter()
        while sent < 10_000:
            bad = [
                attacker.rw(77, 0, [], 1),
                attacker.rw(READ, U32, [(1, 0, 7)], 2),
                attacker.rw(WRITE, 0, [(1 << 30, 0, 7)], 3),
                attacker.rw(WRITE, 0, [(1, 7, 0)], 4),
                encode.encode_indirect(attacker.abi, READ, 5, 0, 12, [1 << 31]),
            ] * 100
            answers = await ring.ask(*bad)
            assert all(status < 0 for _, _, status in answers)
            sent += len(bad)
        seconds = time.perf_counter() - begin
        assert attacker.disk.stats.errors == sent

        def lines():
            return [entry for entry in field.log if entry["event"] == "request failed"]

        await until(lines)
        assert len(lines()) <= 5 * (seconds + 2)
        # Later one learns how many there were.
        log_limit_of(attacker.disk.connection).seconds = 0
        assert (await ring.ask(attacker.rw(77, 0, [], 1)))[0][2] == -2
        await until(lambda: sum(1 + line["suppressed"] for line in lines()) == sent + 1)
        lines = lines()
        assert all(len(str(line)) < 400 and "\n" not in str(line) for line in lines)


@pytest.mark.parametrize("queues", [1, 4])
async def test_persistent_pages_beyond_the_bound(field, queues):
    """Every page of a large guest, once: no more stays mapped than the bound per ring allows."""
    pages = 9000
    async with field.attacker(queues=queues, pages=pages) as attacker:
        refs = attacker.pages(pages - 100)
        ring = attacker.ring
        bound = 33 * ring.entries
        most = 0
        for at in range(0, len(refs) - 352, 352):
            entries = [
                attacker.rw(READ, 0, [(ref, 0, 7) for ref in refs[at + i * 11 :][:11]], i)
                for i in range(32)
            ]
            answers = await ring.ask(*entries)
            assert {status for _, _, status in answers} == {0}
            most = max(most, attacker.pages_in_use(field))
        assert bound // 2 < most <= bound
        await attacker.must_serve()


@pytest.mark.parametrize("mode", MODES)
async def test_memory_does_not_grow_with_connections_or_requests(field, mode):
    """Rings made and dropped, full of requests, many times over."""
    features = Features(barrier=True, discard=True, max_queues=4)

    async def one_life() -> None:
        async with field.attacker(mode=mode, queues=2, order=1, features=features) as attacker:
            pages = attacker.pages(64)
            for ring in attacker.rings:
                entries = [
                    attacker.rw(number % 2, 8 * number, [(pages[number], 0, 7)], number)
                    for number in range(64)
                ]
                await ring.ask(*entries)

    for _ in range(10):
        await one_life()
    before = resident_bytes()
    for _ in range(60):
        await one_life()
    assert resident_bytes() - before < 8 * MIB


async def test_bounce_memory_has_a_bound(field):
    async with field.attacker(mode=GrantMode.COPY, order=4, size=2 * MIB) as attacker:
        (data,) = attacker.pages(1)
        (table,) = attacker.pages(1)
        packed = encode.pack_indirect_page([(data, 0, 7)] * 256)
        attacker.guest.page(table)[: len(packed)] = packed
        before = resident_bytes()
        entries = [
            encode.encode_indirect(attacker.abi, WRITE, number, 0, 256, [table])
            for number in range(512)
        ]
        answers = await attacker.ring.ask(*entries)
        assert {status for _, _, status in answers} == {0}
        assert resident_bytes() - before < MAX_BOUNCE_PAGES * PAGE_SIZE + 8 * MIB


@pytest.mark.parametrize("mode", [GrantMode.MAP, GrantMode.PERSISTENT])
async def test_requests_in_flight_hold_a_bounded_number_of_mappings(field, mode):
    """Storage is slow, and the guest asks for half a gigabyte meanwhile: all others need the
    hypervisor's mappings too."""
    gate = trio.Event()
    held = Fault(wait=gate, error=None)
    device = FaultDevice(MemoryDevice(2 * MIB), held)
    async with field.attacker(mode=mode, order=4, device=device) as attacker:
        data = attacker.pages(256)
        tables = attacker.pages(2)
        for table, refs in zip(tables, (data, data[::-1]), strict=True):
            packed = encode.pack_indirect_page([(ref, 0, 7) for ref in refs])
            attacker.guest.page(table)[: len(packed)] = packed
        most = ATTACKER_PAGES + RESERVE
        entries = [
            encode.encode_indirect(attacker.abi, READ, number, 0, 256, [tables[number % 2]])
            for number in range(512)
        ]
        attacker.ring.put(*entries)
        attacker.ring.publish()
        await attacker.consumed()
        most_held = most // 256 if mode is GrantMode.MAP else 512
        await until(lambda: held.hits == most_held)
        await field.victim_is_well()
        in_use = attacker.pages_in_use(field)
        gate.set()
        assert in_use <= most
        answers = await attacker.ring.collect(512)
        assert {status for _, _, status in answers} == {0}
        assert len(set(answers)) == 512
