"""A guest that changes everything it can reach while its requests are under way."""

from __future__ import annotations

import os
import random
from contextlib import suppress

import trio
import trio.testing
from blkif_oracle import PAGE, judge
from hostile_world import U32, Battlefield, GivenUp, until
from ring_fuzz import Attack, plan

from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice
from xbd.core.errors import RingCorrupt


class Scribbler(Attack):
    """Its requests are held at a gate; what was consumed before the scribbling is what counts."""

    def __init__(self, attacker, dice, a_plan) -> None:
        super().__init__(attacker, dice, a_plan)
        self.may_change: set[int] = set()
        """Sectors that some request in order wrote or discarded."""
        self.secret = attacker.guest.alloc_pages(1)[0]
        self.guest.sources += attacker.ring.refs
        self.may_spoil_ring = dice.random() < 0.3
        """Whether its reads may go to the ring's own pages."""
        self.guest.targets += attacker.ring.refs[-1:] * self.may_spoil_ring

    async def scribble_round(self, gate: Fault) -> bool:
        """False: the ring is closed."""
        dice, attacker, ring = self.dice, self.attacker, self.attacker.ring
        self.guest.write_tables()
        count = dice.randint(1, ring.entries)
        for index in range(count):
            ring.slot(ring.prod + index)[:] = self.guest.entry()
        for index in range(count):
            self._note(judge(bytes(ring.slot(ring.prod + index)), self.rules))
        gate.wait = trio.Event()
        ring.prod = (ring.prod + count) & U32
        ring.publish()
        if self.may_spoil_ring:
            await until(
                lambda: (
                    attacker.in_flight or ring.words[2] != ring.cons or not attacker.link.connected
                )
            )
            await trio.testing.wait_all_tasks_blocked()
        else:
            await attacker.consumed()
        if not attacker.link.connected:
            return False  # a read into the ring's own page did it
        for _ in range(dice.randint(1, 4)):
            if self._scribble():
                ring.port.notify()
                await attacker.until_ended()
                break
            ring.port.notify()
            await trio.testing.wait_all_tasks_blocked()
        gate.wait.set()
        await self._settle()
        self.batches += 1
        self.requests += count
        if not attacker.link.connected:
            return False
        # Pick up the pieces: the indices as the backend has them, if each request had an answer.
        ring.cons = ring.prod
        ring.words[0] = ring.words[2] = ring.prod
        ring.words[1] = (ring.prod + 1) & U32
        self._restore_grants()
        return await self._goes_on()

    async def _goes_on(self) -> bool:
        """Whether the ring is served; as it should be, unless reads have spoilt it."""
        attacker = self.attacker
        unknown = bytes([77, 1]) + bytes(attacker.abi.request_size - 2)
        try:
            assert await attacker.ring.ask(unknown) == [(0, 77, -2)]
        except GivenUp:
            if self.may_spoil_ring:
                return False
            raise
        return True

    def _note(self, verdict) -> None:
        if verdict.kind == "read" and any(
            ref in self.attacker.ring.refs for ref, _, _ in verdict.pieces
        ):
            self.may_spoil_ring = True
        if verdict.kind in ("write", "discard"):
            first = verdict.offset // 512
            self.may_change.update(range(first, first + verdict.length // 512))
            # Behind a barrier indirect pages are read late; what is in them then is not known.
        if verdict.tables:
            self.may_change.update(range(verdict.offset // 512, self.plan.size // 512))

    def _scribble(self) -> bool:
        """Whatever a guest can write.  True: the indices can't be used any more."""
        dice, ring, guest = self.dice, self.attacker.ring, self.attacker.guest
        for index in range(ring.entries):
            if dice.random() < 0.5:
                ring.slot(index)[:] = dice.randbytes(len(ring.slot(index)))
        for ref in [*self.guest.sources, *self.guest.targets, *self.guest.tables]:
            if ref not in ring.refs and dice.random() < 0.6:
                guest.page(ref)[:] = dice.randbytes(PAGE)
            if dice.random() < 0.2:
                guest._table[ref] = dice.choice((0, 1, 5, dice.randrange(1 << 64)))
        for word in (1, 2, 3):
            if dice.random() < 0.5:
                ring.words[word] = dice.randrange(1 << 32)
        if dice.random() < 0.1:
            ring.words[0] = (ring.prod + dice.choice((ring.entries + 1, -1, 1 << 31))) & U32
            return True
        return False

    def _restore_grants(self) -> None:
        for ref in [*self.guest.sources, *self.guest.targets, *self.guest.tables]:
            self.attacker.guest._table[ref] = 1

    async def _settle(self) -> None:
        with trio.fail_after(20):
            await trio.testing.wait_all_tasks_blocked()
            while self.attacker.in_flight:
                await trio.testing.wait_all_tasks_blocked(0.001)


async def scribble(field: Battlefield, dice: random.Random, rounds: int) -> Scribbler:
    """One guest that scribbles, and a look at the victim afterwards."""
    a_plan = plan(dice)
    memory = MemoryDevice(a_plan.size, writable=not a_plan.read_only, resolvable=a_plan.resolvable)
    os.pwrite(memory.disk.fd, dice.randbytes(a_plan.size), 0)
    before = memory.disk.content
    gate = Fault(error=None, rate=0.7, operations={"readv", "writev", "flush", "discard"})
    device = FaultDevice(memory, gate, seed=dice.randrange(1 << 32))
    async with field.attacker(
        mode=a_plan.mode,
        abi=a_plan.abi,
        order=a_plan.order,
        start=a_plan.start,
        device=device,
        features=a_plan.features,
        read_only=a_plan.read_only,
        pages=64,
    ) as attacker:
        scribbler = Scribbler(attacker, dice, a_plan)
        secret = bytes(attacker.guest.page(scribbler.secret))
        with trio.fail_after(60):
            for _ in range(rounds):
                if not await scribbler.scribble_round(gate):
                    break
            else:
                if dice.random() < 0.5:
                    await attacker.disconnect()
        with suppress(AttributeError):
            gate.wait.set()
        await attacker.link.abandon()
        failure = attacker.link.failure
        assert failure is None or isinstance(failure, RingCorrupt)
        assert bytes(attacker.guest.page(scribbler.secret)) == secret
        after = memory.disk.content
        for sector in set(range(a_plan.size // 512)) - scribbler.may_change:
            at = 512 * sector
            assert after[at : at + 512] == before[at : at + 512], f"sector {sector} was touched"
    await field.victim_is_well()
    return scribbler
