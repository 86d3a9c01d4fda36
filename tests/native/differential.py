"""The same guest before every data path: what it asks is random, and what it finds must not be.

A `Scenario` says how the guest and its disk are made, and by which seed its rings are filled, byte
by byte; `play` serves that by one data path and tells what came of it.

What is in flight at the same time touches different bytes of disk and memory, unless a barrier is
in between: so nothing depends on the order in which it is done.  Requests that would wait for the
next round.
"""

from __future__ import annotations

import functools
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import attrs
import trio
from blkif_oracle import OKAY, Rules, Verdict, judge
from hostile_world import DOM0, SECONDS, U32, RawRing

from xbd.core.backend.bell import Bell
from xbd.core.backend.link import Link
from xbd.core.blkif import X86_64, Abi, constants, encode
from xbd.core.datapath import (
    Disk,
    Features,
    FrontendConfig,
    GrantMode,
    QueueConfig,
    connection,
    engine,
)
from xbd.core.datapath.native.threads import NativeThreads
from xbd.core.driver import Extent, Geometry, HostExtent
from xbd.core.driver.api import Capability, Concurrency
from xbd.core.driver.buffers import total
from xbd.core.driver.open import open_device
from xbd.core.driver.testing import MemoryDevice
from xbd.core.hypervisor.embedded import EmbeddedHost
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import PAGE_SIZE

SECTOR = constants.SECTOR
DATA_PAGES = 144
TABLE_PAGES = 8
GUEST_PAGES = 256
NAME = "xbdback7i51712"
COUNTERS = ("rd_req", "wr_req", "f_req", "ds_req", "rd_bytes", "wr_bytes", "errors")


# -- the disk -------------------------------------------------------------------------------


class Dawdling(MemoryDevice):
    """Its methods take more or less time, and overtake each other."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._pace = random.Random(os.urandom(8))

    async def _begin(self, *arguments) -> None:
        await super()._begin(*arguments)
        for _ in range(self._pace.choice((0, 0, 1, 5, 20))):
            await trio.lowlevel.checkpoint()


class ForReading(Dawdling):
    """Never resolves for writing."""

    def resolve(self, offset, length, *, for_write):
        return None if for_write else super().resolve(offset, length, for_write=False)


class Many(Dawdling):
    """Never resolves, and is asked for many requests at a time where the data path can."""

    batching = True

    def resolve(self, offset, length, *, for_write):
        return None

    async def read_many(self, requests):
        for request in requests:
            await self.readv(request.offset, request.buffers)

    async def write_many(self, requests):
        for request in requests:
            await self.writev(request.offset, request.buffers)


class Failing(Dawdling):
    """Gives files that can't be used: one that must not be written to, one that is empty."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._read_only = os.open(f"/proc/self/fd/{self.disk.fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._empty = os.memfd_create("empty", os.MFD_CLOEXEC)

    def resolve(self, offset, length, *, for_write):
        half = self.geometry.size // 2 // PAGE_SIZE * PAGE_SIZE
        size = half - offset if offset < half else self.geometry.size - offset
        fd = self._read_only if for_write or offset < half else self._empty
        return [HostExtent(fd=fd, offset=offset, length=size)]

    async def aclose(self) -> None:
        if not self.closed:
            os.close(self._read_only)
            os.close(self._empty)
        await super().aclose()


class Spread(Dawdling):
    """Units in any order in several files, and some nowhere until they are written to."""

    def __init__(self, size, *, unit, files, everywhere, seed, **arguments) -> None:
        super().__init__(size, **arguments)
        self._unit = unit
        self._seed = seed
        units = -(-size // unit)
        dice = random.Random(seed)
        self._files = [os.memfd_create("spread", os.MFD_CLOEXEC) for _ in range(files)]
        access = os.O_RDWR if Capability.WRITE in self.capabilities else os.O_RDONLY
        self._given = [os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC) for fd in self._files]
        places = [(number % files, number // files) for number in range(units)]
        dice.shuffle(places)
        self._free = places
        self._places: dict[int, tuple[int, int]] = {}
        for number in range(units):
            if everywhere or dice.random() < 0.5:
                self._allocate_unit(number)

    def fill(self, content: bytes) -> None:
        """Before anything else: only what has a place keeps it."""
        for number in self._places:
            for fd, position, at, size in self._pieces(
                number * self._unit, min(self._unit, self.geometry.size - number * self._unit)
            ):
                os.pwrite(fd, content[at : at + size], position)

    @property
    def content(self) -> bytes:
        found = bytearray(self.geometry.size)
        for fd, position, at, size in self._pieces(0, len(found)):
            if fd >= 0:
                found[at : at + size] = os.pread(fd, size, position)
        return bytes(found)

    def _allocate_unit(self, number: int) -> None:
        if number not in self._places:
            self._places[number] = file, place = self._free.pop()
            os.pwrite(self._files[file], bytes(self._unit), place * self._unit)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """File or -1, position in it, offset on the disk, length."""
        end = offset + length
        while offset < end:
            number, inside = divmod(offset, self._unit)
            size = min(self._unit - inside, end - offset)
            file, place = self._places.get(number, (-1, 0))
            yield (
                (self._files[file] if file >= 0 else -1),
                place * self._unit + inside,
                offset,
                size,
            )
            offset += size

    def resolve(self, offset, length, *, for_write):
        if for_write and Capability.WRITE not in self.capabilities:
            return None
        found = []
        end = min(offset + length + 3 * self._unit, self.geometry.size)
        while offset < end:
            number, inside = divmod(offset, self._unit)
            if number not in self._places:
                break
            file, place = self._places[number]
            size = min(self._unit - inside, self.geometry.size - offset)
            found.append(
                HostExtent(fd=self._given[file], offset=place * self._unit + inside, length=size)
            )
            offset += size
        return found or None

    async def readv(self, offset, buffers):
        await self._begin(Capability.NONE, offset, total(buffers), buffers)
        data = bytearray(total(buffers))
        for fd, position, at, size in self._pieces(offset, len(data)):
            if fd >= 0:
                data[at - offset : at - offset + size] = os.pread(fd, size, position)
        done = 0
        for buffer in buffers:
            buffer[:] = data[done : done + len(buffer)]
            done += len(buffer)

    async def writev(self, offset, buffers):
        await self._begin(Capability.WRITE, offset, total(buffers), buffers)
        self._write(offset, b"".join(buffers))

    async def discard(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            await self._begin(Capability.DISCARD, extent.offset, extent.length)
            self._write(extent.offset, b"\xdd" * extent.length)

    def _write(self, offset: int, data: bytes) -> None:
        for number in range(offset // self._unit, -(-(offset + len(data)) // self._unit)):
            self._allocate_unit(number)
        for fd, position, at, size in self._pieces(offset, len(data)):
            os.pwrite(fd, data[at - offset : at - offset + size], position)

    async def aclose(self) -> None:
        if not self.closed:
            for fd in (*self._files, *self._given):
                os.close(fd)
        await super().aclose()


class Placing(Spread):
    """Finds places before it is written to, for most units."""

    def can_place(self, offset, length):
        return any(fd < 0 for fd, _, _, _ in self._pieces(offset, length))

    async def place(self, extents):
        await self._begin(Capability.WRITE, 0, 0)
        for extent in extents:
            first, last = extent.offset, extent.offset + extent.length - 1
            for number in range(first // self._unit, last // self._unit + 1):
                if number % 5:
                    self._allocate_unit(number)


KINDS = {
    "everything": Dawdling,
    "nothing": Dawdling,
    "nothing, many at a time": Many,
    "for reading": ForReading,
    "failing": Failing,
    "parts": Spread,
    "in several files": Spread,
    "placed": Placing,
}
DEVICES = tuple(KINDS)
SPLITTING = ("failing", "parts", "in several files", "placed")
"""Requests to these may be moved in several pieces, in any order."""


# -- what there is, and what is asked -------------------------------------------------------


@attrs.frozen(kw_only=True)
class Scenario:
    """A guest, its disk, and the seeds of its requests."""

    abi: Abi
    mode: GrantMode
    order: int
    queues: int
    start: int
    """The rings' first index."""
    device: str
    size: int
    logical_block: int
    request_alignment: int
    memory_alignment: int
    unit: int
    """Of devices that are in pieces."""
    read_only: bool
    features: Features
    seed: int
    requests: tuple[str, ...]
    """The kind of each."""
    corrupt: int | None
    """What is added to a ring's producer index in the end."""


@attrs.define
class Round:
    """What is in flight at the same time."""

    entries: list[list[bytes]]
    """By queue."""
    tables: dict[int, bytes] = attrs.Factory(dict)
    """Indirect pages and what they hold."""
    grants: dict[int, str] = attrs.Factory(dict)
    """Pages whose grants are changed before."""


@attrs.define
class Outcome:
    """What a data path made of it."""

    answers: list[list[list[tuple[int, int, int]]]]
    """By round and queue: id, operation, status, sorted."""
    memory: bytes
    """The guest's, without its rings."""
    content: bytes
    """The disk's."""
    stats: dict[str, int]
    produced: list[int]
    """Each ring's index behind its last response."""
    failure: str | None
    """Why the rings were given up."""


class _Footprint:
    """Sectors of disk and memory, read and written."""

    def __init__(self, verdict: Verdict) -> None:
        first = verdict.offset // SECTOR
        sectors = range(first, first + verdict.length // SECTOR)
        memory = [
            (ref << 3) + (start + at) // SECTOR
            for ref, start, length in verdict.pieces
            for at in range(0, length, SECTOR)
        ]
        self.repeats = verdict.kind == "read" and len(set(memory)) < len(memory)
        """Whether it reads to the same memory twice."""
        nothing: frozenset[int] = frozenset()
        moves = verdict.kind if verdict.pieces or verdict.kind == "discard" else ""
        self.disk_read = frozenset(sectors) if moves == "read" else nothing
        self.disk_written = frozenset(sectors) if moves in ("write", "discard") else nothing
        self.memory_read = frozenset(memory) if moves == "write" else nothing
        self.memory_written = frozenset(memory) if moves == "read" else nothing

    def meets(self, other: _Footprint) -> bool:
        """Whether it matters which comes first."""
        return bool(
            self.disk_written & (other.disk_read | other.disk_written)
            or other.disk_written & self.disk_read
            or self.memory_written & (other.memory_read | other.memory_written)
            or other.memory_written & self.memory_read
        )


class _Builder:
    """Makes requests, and puts them into rounds."""

    def __init__(self, scenario: Scenario, data: Sequence[int], tables: Sequence[int]) -> None:
        self.scenario = scenario
        self.data = data
        self.tables = tables
        self.grants = dict.fromkeys(tables, "rw")
        dice = random.Random(scenario.seed)
        for ref in data:
            self.grants[ref] = dice.choices(("rw", "ro", ""), (20, 3, 1))[0]
        self.first_grants = dict(self.grants)
        self.rounds: list[Round] = []
        self._new_round()
        features = scenario.features
        self._rules = Rules(
            wide=scenario.abi is X86_64,
            size=scenario.size,
            read_only=scenario.read_only,
            flush=features.flush,
            barrier=features.barrier,
            discard=features.discard,
            max_indirect=features.max_indirect_segments,
            keeps_pages=scenario.mode is GrantMode.PERSISTENT,
            grant=lambda ref: self.grants.get(ref, ""),
            page=lambda ref: self.rounds[-1].tables.get(ref, bytes(PAGE_SIZE)),
        )
        for number, kind in enumerate(scenario.requests):
            self._dice = random.Random(f"{scenario.seed} {number}")
            if kind == "grants":
                self._change_grants()
            elif kind != "nothing":
                self._add(kind, number)

    # -- rounds -----------------------------------------------------------------------------

    def _new_round(self) -> None:
        queues = self.scenario.queues
        self.rounds.append(Round([[] for _ in range(queues)]))
        self._all: list[list[_Footprint]] = [[] for _ in range(queues)]
        self._since_barrier: list[list[_Footprint]] = [[] for _ in range(queues)]

    def _change_grants(self) -> None:
        """Of pages that stay mapped it would depend on what is mapped already."""
        if self.scenario.mode is GrantMode.PERSISTENT:
            return
        self._new_round()
        for ref in self._dice.sample(self.data, 10):
            self.grants[ref] = self._dice.choice(("rw", "rw", "ro", ""))
            self.rounds[-1].grants[ref] = self.grants[ref]

    def _add(self, kind: str, number: int) -> None:
        scenario = self.scenario
        queue = self._dice.randrange(scenario.queues)
        if len(self.rounds[-1].tables) == len(self.tables) or len(
            self.rounds[-1].entries[queue]
        ) == (32 << scenario.order):
            self._new_round()
        entry, table = self._entry(kind, number)
        for ref, packed in table.items():
            self.rounds[-1].tables[ref] = packed
        judged = entry
        if entry[0] == constants.DISCARD and scenario.features.discard_secure:
            judged = entry[:1] + b"\0" + entry[2:]
        verdict = judge(judged, self._rules)
        footprint = _Footprint(verdict)
        if footprint.repeats and scenario.device in SPLITTING:
            return
        elsewhere = [all_ for other, all_ in enumerate(self._all) if other != queue]
        if any(map(footprint.meets, chain.from_iterable(elsewhere))) or not self._hold_back(
            queue, footprint
        ):
            used = {ref: self.rounds[-1].tables.pop(ref) for ref in table}
            self._new_round()
            self.rounds[-1].tables.update(used)
        self.rounds[-1].entries[queue].append(entry)
        if self._is_barrier(entry, verdict):
            self._since_barrier[queue] = []
        self._all[queue].append(footprint)
        self._since_barrier[queue].append(footprint)

    def _hold_back(self, queue: int, footprint: _Footprint) -> bool:
        """By a barrier, if it is needed; False: there is none."""
        if not any(map(footprint.meets, self._since_barrier[queue])):
            return True
        entries = self.rounds[-1].entries[queue]
        if not self.scenario.features.barrier or len(entries) + 1 >= 32 << self.scenario.order:
            return False
        operation = constants.WRITE_BARRIER
        entries.append(encode.encode_rw(self.scenario.abi, operation, len(entries), 0, []))
        self._since_barrier[queue] = []
        return True

    def _is_barrier(self, entry: bytes, verdict: Verdict) -> bool:
        """Whether it is certain that it holds back what follows."""
        aligned = (verdict.offset | verdict.length) % self.scenario.logical_block == 0
        return (
            entry[0] == constants.WRITE_BARRIER
            and verdict.status == OKAY
            and (aligned or not verdict.kind)
        )

    # -- requests ---------------------------------------------------------------------------

    def _entry(self, kind: str, number: int) -> tuple[bytes, dict[int, bytes]]:
        dice, abi = self._dice, self.scenario.abi
        request_id = number if dice.random() < 0.95 else dice.randrange(1 << 64)
        if kind in ("read", "write", "barrier", "flush with data"):
            operation = {"read": 0, "write": 1, "barrier": 2, "flush with data": 3}[kind]
            count = dice.choice((1, 1, 1, 2, 3, 11))
            segments = self._segments(count, write=operation != 0)
            sector = self._sector(sum(last - first + 1 for _, first, last in segments))
            return encode.encode_rw(abi, operation, request_id, sector, segments), {}
        if kind in ("flush", "empty barrier"):
            operation = constants.FLUSH_DISKCACHE if kind == "flush" else constants.WRITE_BARRIER
            return encode.encode_rw(abi, operation, request_id, 0, []), {}
        if kind == "discard":
            count = dice.choice((0, 1, 8, 8, 16, 64, self.scenario.size // SECTOR))
            secure = dice.random() < 0.2
            return encode.encode_discard(
                abi, request_id, self._sector(count), count, secure=secure
            ), {}
        if kind == "indirect":
            return self._indirect(request_id)
        return self._strange(request_id), {}

    def _strange(self, request_id: int) -> bytes:
        """A request that is wrong, mostly."""
        dice, abi = self._dice, self.scenario.abi
        what = dice.randrange(6)
        if what == 0:
            return dice.randbytes(abi.request_size)
        operation = dice.choice((0, 1, 2, 3))
        segments = self._segments(dice.choice((1, 2, 11)), write=operation != 0)
        entry = bytearray(encode.encode_rw(abi, operation, request_id, self._sector(1), segments))
        at = abi.segments_offset + 8 * dice.randrange(len(segments))
        if what == 1:
            entry[0] = dice.choice((4, 7, 77, 255))
        elif what == 2:
            entry[1] = dice.choice((0, 12, 255))
        elif what == 3:
            sector = dice.choice((self.scenario.size // SECTOR, 1 << 31, 1 << 55, (1 << 64) - 1))
            struct.pack_into("<Q", entry, abi.sector_offset, sector)
        elif what == 4:
            struct.pack_into("<I", entry, at, dice.choice((0, GUEST_PAGES, U32, *self.data)))
        else:
            entry[at + 4], entry[at + 5] = dice.choice(((7, 0), (0, 8), (8, 8), (255, 255)))
        return bytes(entry)

    def _indirect(self, request_id: int) -> tuple[bytes, dict[int, bytes]]:
        dice, scenario = self._dice, self.scenario
        operation = dice.choice((0, 1, 0, 1, 0, 1, 2))
        most = scenario.features.max_indirect_segments
        count = dice.choice((1, 12, 12, 33, 33, 100, 256, 257, 400, 512, 513))
        if count > most and dice.random() < 0.9:
            count = dice.randint(1, max(1, min(most, 60)))
        segments = self._segments(count, write=operation != 0)
        sector = self._sector(sum(last - first + 1 for _, first, last in segments))
        left = [ref for ref in self.tables if ref not in self.rounds[-1].tables]
        needed = -(-count // 512)
        if len(left) < needed:
            self._new_round()
            left = self.tables
        table = {}
        for number, ref in enumerate(left[:needed]):
            packed = encode.pack_indirect_page(segments[512 * number : 512 * number + 512])
            table[ref] = packed.ljust(PAGE_SIZE, b"\0")
        refs = list(table)
        if dice.random() < 0.05:
            refs[-1] = dice.choice((0, U32, GUEST_PAGES + 1))
        entry = encode.encode_indirect(scenario.abi, operation, request_id, sector, count, refs)
        return entry, table

    def _sector(self, count: int) -> int:
        """Where so many may lie; at the disk's end, and beyond it, now and then."""
        dice, scenario = self._dice, self.scenario
        sectors = scenario.size // SECTOR
        step = scenario.logical_block // SECTOR if dice.random() < 0.9 else 1
        how = dice.random()
        if how < 0.1:
            return max(0, sectors - count)
        if how < 0.15:
            return max(0, sectors - count + step)
        if how < 0.5:
            return min(dice.randrange(8) * 8, max(0, sectors - count)) // step * step
        return dice.randrange(max(1, sectors - count)) // step * step

    def _segments(self, count: int, *, write: bool) -> list[tuple[int, int, int]]:
        """Of whole pages, or of parts of pages that may be the same; sectors of a read twice
        only now and then."""
        dice, scenario = self._dice, self.scenario
        whole = dice.random() < (0.4 if scenario.logical_block == SECTOR else 0.9)
        good = [ref for ref in self.data if self.grants[ref] == "rw"]
        if write and scenario.mode is not GrantMode.PERSISTENT:
            good = [ref for ref in self.data if self.grants[ref]]
        pool = good if dice.random() < 0.95 else self.data
        if whole and count <= len(pool):
            return [(ref, 0, 7) for ref in dice.sample(pool, count)]
        sectors = [(ref, at) for ref in pool for at in range(8)]
        if count <= len(sectors) and dice.random() < 0.9:
            return [(ref, at, at) for ref, at in dice.sample(sectors, count)]
        spans = ((0, 7), (0, 0), (7, 7), (2, 5))
        return [(dice.choice(pool), *dice.choice(spans)) for _ in range(count)]


@functools.lru_cache(maxsize=1)
def _build(scenario: Scenario, data: tuple[int, ...], tables: tuple[int, ...]) -> _Builder:
    """Once for all data paths."""
    return _Builder(scenario, data, tables)


@functools.lru_cache(maxsize=2)
def _noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


# -- serving it -----------------------------------------------------------------------------


@attrs.frozen
class DataPath:
    """One of those that are compared."""

    name: str
    threads: NativeThreads | None
    make_engine: Callable[[], engine.IoEngine] = engine.UringEngine
    """In Python."""


def _make_device(scenario: Scenario) -> MemoryDevice:
    geometry = Geometry(
        size=scenario.size,
        logical_block=scenario.logical_block,
        physical_block=max(scenario.logical_block, scenario.request_alignment),
        request_alignment=scenario.request_alignment,
        memory_alignment=scenario.memory_alignment,
    )
    common = {"geometry": geometry, "writable": not scenario.read_only}
    content = _noise(scenario.seed, scenario.size)
    kind = KINDS[scenario.device]
    if issubclass(kind, Spread):
        several = scenario.device == "in several files"
        spread = kind(
            scenario.size,
            unit=scenario.unit,
            files=3 if several else 1,
            everywhere=several,
            seed=scenario.seed,
            **common,
        )
        spread.fill(content)
        return spread
    device = kind(scenario.size, resolvable=scenario.device != "nothing", **common)
    os.pwrite(device.disk.fd, content, 0)
    return device


async def play(scenario: Scenario, path: DataPath, host: EmbeddedHost) -> Outcome:
    """All rounds, one after the other, and then perhaps an absurd index."""
    async with (
        GuestDomain.connect(host.directory, pages=GUEST_PAGES) as guest,
        _opened(scenario) as (device, access),
        trio.open_nursery() as nursery,
    ):
        disk = Disk(
            access,
            name=NAME,
            devid=51712,
            read_only=scenario.read_only,
            features=scenario.features,
            hypervisor=host.hypervisor,
            grants=scenario.mode,
            threads=path.threads,
        )
        rings = [
            RawRing(guest, scenario.abi, scenario.order, scenario.start)
            for _ in range(scenario.queues)
        ]
        data, tables = guest.alloc_pages(DATA_PAGES), guest.alloc_pages(TABLE_PAGES)
        builder = _build(scenario, tuple(data), tuple(tables))
        _set_grants(guest, builder.first_grants)
        noise = _noise(scenario.seed, PAGE_SIZE * DATA_PAGES)
        for number, ref in enumerate(data):
            guest.page(ref)[:] = noise[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
        link = Link(disk, nursery, Bell())
        for ring in rings:
            ring.port = await guest.alloc_port(DOM0)
            ring.link = link
        config = FrontendConfig(
            domid=guest.domid,
            abi=scenario.abi,
            ring_order=scenario.order,
            queues=tuple(
                QueueConfig(ring_refs=tuple(ring.refs), event_channel=ring.port.port)
                for ring in rings
            ),
            persistent=scenario.mode is GrantMode.PERSISTENT,
        )
        with patch.object(connection, "make_engine", path.make_engine):
            link.connect(config)
        try:
            answers = [await _one_round(guest, rings, each) for each in builder.rounds]
            produced = [ring.words[2] for ring in rings]
            if scenario.corrupt is not None:
                ring = rings[scenario.seed % len(rings)]
                ring.prod = (ring.prod + scenario.corrupt) & U32
                ring.publish()
                with trio.fail_after(SECONDS):
                    await link._ended.wait()
            else:
                assert await link.drain(SECONDS)
        finally:
            await link.abandon()
        stats = disk.stats
        outcome = Outcome(
            answers=answers,
            memory=b"".join(bytes(guest.page(ref)) for ref in (*data, *tables)),
            content=device.content if isinstance(device, Spread) else device.disk.content,
            stats={
                name: getattr(stats, name)
                for name in (
                    "rd_req",
                    "wr_req",
                    "f_req",
                    "ds_req",
                    "rd_bytes",
                    "wr_bytes",
                    "errors",
                )
            },
            produced=produced,
            failure=None if link.failure is None else repr(link.failure),
        )
        for ring in rings:
            ring.release()
        assert host.hypervisor.mapped_pages == 0
        assert host.hypervisor.bound_ports == 0
        assert access.bugs == 0
    return outcome


@asynccontextmanager
async def _opened(scenario: Scenario):
    device = _make_device(scenario)

    @asynccontextmanager
    async def make(_context):
        yield device
        await device.aclose()

    opening = open_device(
        make,
        name="memory:differential",
        concurrency=Concurrency.PARALLEL,
        device_id=NAME,
        writable=not scenario.read_only,
    )
    async with opening as access:
        yield device, access


def _set_grants(guest: GuestDomain, grants: dict[int, str]) -> None:
    for ref, how in grants.items():
        if how:
            guest.grant(ref, DOM0, readonly=how == "ro")
        else:
            guest.revoke(ref)


async def _one_round(
    guest: GuestDomain, rings: Sequence[RawRing], this: Round
) -> list[list[tuple[int, int, int]]]:
    _set_grants(guest, this.grants)
    for ref, packed in this.tables.items():
        guest.page(ref)[:] = packed
    for ring, entries in zip(rings, this.entries, strict=True):
        if entries:
            ring.put(*entries)
            ring.publish()
    return [
        sorted(await ring.collect(len(entries)))
        for ring, entries in zip(rings, this.entries, strict=True)
    ]


def play_all(
    scenario: Scenario, paths: Sequence[DataPath], directory: Path
) -> list[tuple[DataPath, Outcome]]:
    """One after the other, on one host."""

    async def run() -> list[tuple[DataPath, Outcome]]:
        async with EmbeddedHost.open(directory) as host:
            return [(path, await play(scenario, path, host)) for path in paths]

    return trio.run(run)
