"""Random guests: what they put into a ring, and whether only that happened which they asked for."""

from __future__ import annotations

import os
import random
import struct

import attrs
import trio
from blkif_oracle import OKAY, PAGE, Rules, Verdict, judge
from hostile_world import MODES, U32, Attacker, Battlefield

from xbd.core.blkif import X86_32, X86_64
from xbd.core.datapath import Features, GrantMode
from xbd.core.driver.testing import MemoryDevice
from xbd.core.errors import RingCorrupt

DISK_SIZES = (512, 40960, 65536 + 512, 1 << 18, 1 << 20)
GUEST_PAGES = 64
_WILD = (0, 1, 7, 8, 63, 64, 65, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF)
_WILD_SECTORS = (1 << 31, 1 << 32, (1 << 55) - 1, 1 << 55, (1 << 63) - 1, (1 << 64) - 1)


@attrs.frozen
class Plan:
    """How an attack is set up."""

    abi: object
    mode: GrantMode
    features: Features
    order: int
    start: int
    size: int
    read_only: bool
    resolvable: bool


def plan(dice: random.Random) -> Plan:
    start = dice.choice((0, 1, 31, U32 - 40, U32, 1 << 31, dice.randrange(1 << 32)))
    features = Features(
        flush=dice.random() < 0.8,
        barrier=dice.random() < 0.6,
        discard=dice.random() < 0.7,
        max_indirect_segments=dice.choice((0, 11, 32, 256, 600)),
    )
    return Plan(
        dice.choice((X86_64, X86_32)),
        dice.choice(MODES),
        features,
        dice.choice((0, 0, 1)),
        start,
        dice.choice(DISK_SIZES),
        dice.random() < 0.1,
        dice.random() < 0.7,
    )


class Guest:
    """An attacker's pages, by what they are for, and its requests."""

    def __init__(self, attacker: Attacker, dice: random.Random, size: int) -> None:
        self.attacker = attacker
        self.dice = dice
        self.size = size
        self.sources = attacker.pages(5) + attacker.pages(2, readonly=True)
        self.targets = attacker.pages(8)
        self.tables = attacker.pages(2)
        self.strange = [*attacker.guest.alloc_pages(2), *attacker.pages(1, readonly=True), *_WILD]
        self.strange = [ref for ref in self.strange if ref not in attacker.ring.refs]
        self.kinds = {}
        self.next_id = 0
        for ref in range(1, GUEST_PAGES):
            if ref not in attacker.ring.refs:
                attacker.guest.page(ref)[:] = dice.randbytes(PAGE)

    def grant(self, ref: int) -> str:
        """The guest's own view of its grant table."""
        if not 0 <= ref < GUEST_PAGES:
            return ""
        return {1: "rw", 5: "ro"}.get(self.attacker.guest._table[ref], "")

    def entry(self) -> bytes:
        """A request: often in order, or nearly so."""
        dice, abi = self.dice, self.attacker.abi
        self.next_id += 1
        kind = dice.random()
        if kind < 0.1:
            return dice.randbytes(abi.request_size)
        if kind < 0.55:
            made = self._direct(dice.choice((0, 0, 0, 1, 1, 1, 2, 3)))
        elif kind < 0.75:
            made = self._indirect()
        elif kind < 0.85:
            made = self._discard()
        else:
            made = self._direct(dice.choice((4, 7, 77, 255, 0, 1, 2, 3)), dice.randrange(256))
        if dice.random() < 0.12:
            at = dice.randrange(len(made))
            made = made[:at] + bytes([dice.randrange(256)]) + made[at + 1 :]
        return made

    def _head(self, operation: int, second: int, sector: int) -> bytearray:
        abi = self.attacker.abi
        entry = bytearray(self.dice.randbytes(abi.request_size))
        at = 8 if abi is X86_64 else 4
        entry[0], entry[1] = operation, second
        request_id = self.next_id if self.dice.random() < 0.9 else self.dice.randrange(1 << 64)
        struct.pack_into("<QQ", entry, at, request_id, sector)
        return entry

    def _sector(self) -> int:
        if self.dice.random() < 0.08:
            return self.dice.choice((*_WILD_SECTORS, self.size // 512, self.size // 512 + 1))
        return self.dice.randrange(self.size // 512)

    def _segments(self, count: int, *, write: bool) -> bytes:
        dice = self.dice
        packed = b""
        for _ in range(count):
            pool = self.sources if write else self.targets
            ref = dice.choice(pool if dice.random() < 0.97 else self.strange)
            first = dice.randrange(8)
            last = min(7, first + dice.choice((0, 0, 0, 1, 7)))
            if dice.random() < 0.02:
                first, last = dice.randrange(256), dice.randrange(256)
            packed += struct.pack("<IBBH", ref & U32, first, last, dice.randrange(1 << 16))
        return packed

    def _direct(self, operation: int, count: int | None = None) -> bytes:
        if count is None:
            count = self.dice.choice((0, 1, 1, 1, 2, 3, 5, 11, 12))
        entry = self._head(operation, count, self._sector())
        at = 24 if self.attacker.abi is X86_64 else 20
        packed = self._segments(min(count, 11), write=operation != 0)
        entry[at : at + len(packed)] = packed
        return bytes(entry)

    def _discard(self) -> bytes:
        dice = self.dice
        entry = self._head(5, dice.choice((0, 0, 0, 2, 255, 1)), self._sector())
        count = dice.choice((0, 1, 8, 16, self.size // 512, *_WILD_SECTORS))
        struct.pack_into("<Q", entry, 24 if self.attacker.abi is X86_64 else 20, count)
        return bytes(entry)

    def _indirect(self) -> bytes:
        dice = self.dice
        inner = dice.choice((0, 0, 0, 1, 1, 1, 2, 9))
        entry = self._head(6, inner, self._sector())
        # One count and direction to a table, so that no request spoils another's.
        table = dice.choice(self.tables if dice.random() < 0.97 else self.strange)
        count = dice.choice((0, 1, 2, 12, 31, 33, 512, 513, 4097, 65535))
        struct.pack_into("<H", entry, 2, count)
        at = 28 if self.attacker.abi is X86_64 else 24
        struct.pack_into("<2I", entry, at, table & U32, dice.choice(self.tables))
        return bytes(entry)

    def write_tables(self) -> None:
        """New content for the indirect pages, while nothing is in flight."""
        for ref in self.tables:
            packed = self._segments(512, write=self.dice.random() < 0.5)
            self.attacker.guest.page(ref)[:] = packed


class Expectation:
    """What one batch, all of it in flight at once, may do to image and guest."""

    def __init__(self, verdicts: list[Verdict], image: bytes, memory: bytes) -> None:
        self.image_before = image
        self.memory_before = memory
        self.image: dict[int, list[bytes | None]] = {}
        """By sector: what may be there now; None: anything."""
        self.memory: dict[int, list[int | None]] = {}
        """By 512 bytes of guest memory: which image sectors may have been read to there."""
        for verdict in verdicts:
            if verdict.kind == "discard":
                first = verdict.offset // 512
                for sector in range(first, first + verdict.length // 512):
                    self.image.setdefault(sector, []).append(None)
            elif verdict.kind and verdict.pieces:
                self._transfer(verdict)

    def _transfer(self, verdict: Verdict) -> None:
        sector = verdict.offset // 512
        for gref, start, length in verdict.pieces:
            for at in range(gref * PAGE + start, gref * PAGE + start + length, 512):
                if verdict.kind == "read":
                    if at < len(self.memory_before):
                        self.memory.setdefault(at // 512, []).append(
                            sector if verdict.status == OKAY else None
                        )
                elif verdict.status == OKAY:
                    data = self.memory_before[at : at + 512]
                    self.image.setdefault(sector, []).append(data)
                sector += 1

    def may_be_in_image(self, sector: int) -> list[bytes | None]:
        before = self.image_before[512 * sector : 512 * sector + 512]
        return self.image.get(sector, [before])

    def check_image(self, image: bytes) -> None:
        for sector in range(len(image) // 512):
            allowed = self.may_be_in_image(sector)
            if None not in allowed:
                found = image[512 * sector : 512 * sector + 512]
                assert found in allowed, f"sector {sector} has what nobody wrote there"

    def check_memory(self, memory: bytes, ring: range) -> None:
        for block in range(len(memory) // 512):
            if block * 512 in ring:
                continue
            found = memory[512 * block : 512 * block + 512]
            before = self.memory_before[512 * block : 512 * block + 512]
            reads = self.memory.get(block)
            if reads is None:
                assert found == before, f"guest memory {block * 512:#x} was touched"
            elif None not in reads:
                allowed = []
                for sector in reads:
                    old = self.image_before[512 * sector : 512 * sector + 512]
                    allowed += [old, *self.may_be_in_image(sector)]
                assert None in allowed or found in allowed, f"wrong data at {block * 512:#x}"


class Attack:
    """One connection's worth of random requests, each batch judged."""

    def __init__(self, attacker: Attacker, dice: random.Random, a_plan: Plan) -> None:
        self.attacker = attacker
        self.dice = dice
        self.plan = a_plan
        self.guest = Guest(attacker, dice, a_plan.size)
        self.batches = 0
        self.requests = 0
        features = a_plan.features
        self.rules = Rules(
            wide=a_plan.abi is X86_64,
            size=a_plan.size,
            read_only=a_plan.read_only,
            flush=features.flush,
            barrier=features.barrier,
            discard=features.discard,
            max_indirect=features.max_indirect_segments,
            keeps_pages=a_plan.mode is GrantMode.PERSISTENT,
            grant=self.guest.grant,
            page=lambda ref: bytes(attacker.guest.page(ref)),
        )

    async def run(self, batches: int) -> None:
        """Several batches, perhaps with an absurd step of req_prod in the end."""
        for _ in range(batches):
            await self.batch()
        if self.dice.random() < 0.4:
            await self.jump()
        else:
            if not self.plan.read_only and self.plan.size >= 4096:
                await self.attacker.must_serve()
            await self.attacker.disconnect()
            assert self.attacker.link.failure is None

    async def batch(self) -> None:
        dice, ring = self.dice, self.attacker.ring
        self.guest.write_tables()
        count = dice.choice((1, 1, 2, 5, 16, ring.entries))
        for index in range(count):
            # Some slots keep what is in them: old requests, covered by answers in part.
            if dice.random() < 0.95:
                ring.slot(ring.prod + index)[:] = self.guest.entry()
        if dice.random() < 0.5:
            ring.words[3] = dice.randrange(1 << 32)  # rsp_event is nobody's business but ours
        entries = [bytes(ring.slot(ring.prod + index)) for index in range(count)]
        verdicts = [judge(entry, self.rules) for entry in entries]
        if self._tangled(verdicts):
            for index in range(count):
                ring.slot(ring.prod + index)[:] = bytes(self.attacker.abi.request_size)
            return
        expected = Expectation(
            verdicts, self.attacker.device.disk.content, bytes(self.attacker.guest.memory)
        )
        ring.prod = (ring.prod + count) & U32
        ring.publish()
        answers = await ring.collect(count)
        wanted = sorted((v.id, v.operation, v.status) for v in verdicts)
        assert sorted(answers) == wanted, "not every request has its one answer"
        expected.check_image(self.attacker.device.disk.content)
        first = ring.refs[0] * PAGE
        expected.check_memory(
            bytes(self.attacker.guest.memory), range(first, first + len(ring.refs) * PAGE)
        )
        self.batches += 1
        self.requests += count

    def _tangled(self, verdicts: list[Verdict]) -> bool:
        """Whether a request reads into what another one takes from, or into the ring: then
        nobody can say what happens, only that nothing breaks (see the tests of scribbling)."""
        read = {ref for v in verdicts if v.kind == "read" for ref, _, _ in v.pieces}
        taken = {ref for v in verdicts if v.kind == "write" for ref, _, _ in v.pieces}
        taken |= {ref for v in verdicts for ref in v.tables}
        rings = set(self.attacker.ring.refs)
        return bool(read & taken) or bool((read | taken) & rings)

    async def jump(self) -> None:
        """More requests than there is room for: the end of this ring, and of nothing else."""
        ring = self.attacker.ring
        step = self.dice.choice((ring.entries + 1, 1000, 1 << 31, U32, U32 - ring.entries))
        ring.prod = (ring.prod + step) & U32
        before = self.attacker.device.disk.content
        ring.publish()
        failure = await self.attacker.until_ended()
        assert isinstance(failure, RingCorrupt)
        assert self.attacker.device.disk.content == before


async def attack(field: Battlefield, dice: random.Random, batches: int) -> Attack:
    """One random guest against a host, with a look at the victim afterwards."""
    a_plan = plan(dice)
    device = MemoryDevice(a_plan.size, writable=not a_plan.read_only, resolvable=a_plan.resolvable)
    os.pwrite(device.disk.fd, dice.randbytes(a_plan.size), 0)
    async with field.attacker(
        mode=a_plan.mode,
        abi=a_plan.abi,
        order=a_plan.order,
        start=a_plan.start,
        device=device,
        features=a_plan.features,
        read_only=a_plan.read_only,
        pages=GUEST_PAGES,
    ) as attacker:
        an_attack = Attack(attacker, dice, a_plan)
        with trio.fail_after(60):
            await an_attack.run(batches)
    await field.victim_is_well()
    return an_attack
