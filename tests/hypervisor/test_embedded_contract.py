"""The contract, kept by the embedded host."""

from __future__ import annotations

import pytest
import trio
from hypervisor_contract import CHECKS, DEADLINE, Pages, World, WorldPort

from xbd.core.units import Domid


class EmbeddedPages(Pages):
    def __init__(self, guest, refs):
        self._guest = guest
        self.refs = refs

    def page(self, index):
        return self._guest.page(self.refs[index])

    def revoke(self):
        for ref in self.refs:
            self._guest.revoke(ref)


class EmbeddedPort(WorldPort):
    def __init__(self, port):
        self._port = port
        self.port = port.port

    def notify(self):
        self._port.notify()

    async def wait(self):
        with trio.fail_after(DEADLINE):
            await trio.lowlevel.wait_readable(self._port.fd)
        assert self._port.take()

    def take(self):
        return self._port.take()


class EmbeddedWorld(World):
    missing_guest = Domid(32000)

    def __init__(self, host, guest):
        self.hypervisor = host.hypervisor
        self.guest = guest.domid
        self._domain = guest

    def grant(self, count, *, readonly=False):
        refs = self._domain.alloc_pages(count)
        for ref in refs:
            self._domain.grant(ref, Domid(0), readonly=readonly)
        return EmbeddedPages(self._domain, refs)

    async def offer_port(self):
        return EmbeddedPort(await self._domain.alloc_port(Domid(0)))


@pytest.fixture
async def world(host, guest):
    return EmbeddedWorld(host, guest)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(world, check):
    await check(world)
