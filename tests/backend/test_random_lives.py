"""Toolstack, guest and store do things in any order; nobody leaks, hangs or meets a bug."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import trio
from backend_world import Frontend
from data_paths import NATIVE, PYTHON

from xbd.core.backend.policy import Limits
from xbd.core.blkif.state import XenbusState
from xbd.core.errors import StoreLost

pytestmark = pytest.mark.parametrize("threads", [PYTHON, NATIVE], indirect=True)

STEPS = 60


class Life:
    """One disk of one guest, and everything that can be done to it."""

    def __init__(self, world, attachment, domain, chance):
        self.world = world
        self.attachment = attachment
        self.frontend = Frontend(attachment, domain)
        self.chance = chance
        self.domain = domain

    async def any_state(self):
        await self.frontend.state(self.chance.choice(range(9)))

    async def next_state(self):
        await self.frontend.state(self.chance.choice([5, 6, 1]))

    async def new_ring(self):
        if self.frontend.refs:
            self.frontend.drop_ring()
        await self.frontend.make_ring(self.chance.choice([0, 0, 1, 2]))
        await self.frontend.publish(self.chance.choice([3, 3, 3, 4]))

    async def requests(self):
        if self.frontend.ring is not None and self.frontend.ring.free > 4:
            for _ in range(4):
                self.frontend.submit(self.chance.choice([0, 1, 3, 9]), self.chance.randrange(3000))

    async def corrupt_ring(self):
        if self.frontend.refs:
            self.domain.page(self.frontend.refs[0])[0:4] = self.chance.randbytes(4)
            self.frontend.port.notify()

    async def junk(self):
        name = self.chance.choice(["ring-ref", "event-channel", "ring-page-order", "protocol"])
        await self.frontend.write(**{name: self.chance.choice(["", "x", "7", "99999", "-1"])})

    async def no_keys(self):
        await self.frontend.remove("ring-ref", "event-channel", "state")

    async def detach(self):
        if await self.attachment.key("state") is not None:
            await self.attachment.order_detach()

    async def remove(self):
        await self.attachment.remove()

    async def attach(self):
        disk = self.chance.choice(["imagefile:{0}/disk.img", "imagefile:{0}/none.img", "oops"])
        self.attachment.connected = self.chance.random() < 0.8
        await self.attachment.write(disk.format(self.world.directory))

    async def script(self):
        if await self.attachment.key("state") is not None:
            await self.attachment.set("hotplug-status", "connected")

    async def cut_store(self):
        self.world.store._link.lose("a test cut it")

    async def rest(self):
        await trio.testing.wait_all_tasks_blocked(0.001)


@pytest.mark.parametrize("seed", range(12))
async def test_any_order_of_events(world, seed):
    chance = random.Random(seed)
    world.image()
    limits = Limits(failures=1000, frontend_seconds=0.05, drain_seconds=2.0)
    await world.start(limits=limits)
    async with world.guest() as domain:
        attachment = await world.attach(domain.domid, f"imagefile:{world.directory}/disk.img")
        life = Life(world, attachment, domain, chance)
        deeds = [life.new_ring, life.new_ring, life.next_state, life.requests, life.requests]
        deeds += [life.any_state, life.corrupt_ring, life.junk, life.no_keys, life.script]
        deeds += [life.detach, life.remove, life.attach, life.attach, life.rest, life.rest]
        if seed % 3 == 0:
            deeds += [life.cut_store]
        with trio.fail_after(60):
            for _ in range(STEPS):
                with suppress(StoreLost):
                    await chance.choice(deeds)()
            await _still_works(world, life)
    await attachment.remove()
    await world.until_gone(attachment)


async def _still_works(world, life):
    """After all that an ordinary attach works."""
    await life.attachment.remove()
    await world.until_gone(life.attachment)
    if life.frontend.refs:
        life.frontend.drop_ring()
    life.attachment.connected = True
    await life.attachment.write(f"imagefile:{world.directory}/disk.img")
    await life.attachment.until_state(XenbusState.INIT_WAIT)
    assert await life.attachment.key("xbd-status") == "open"
    frontend = Frontend(life.attachment, life.domain)
    await frontend.connect()
    await frontend.write_sector(0, b"a" * 512)
