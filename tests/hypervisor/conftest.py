"""Hosts and guests for the tests of this room."""

from __future__ import annotations

import pytest

from xbd.core.hypervisor.embedded import EmbeddedHost
from xbd.core.hypervisor.embedded_guest import GuestDomain

pytest.register_assert_rewrite("hypervisor_contract")


@pytest.fixture
async def host(tmp_path):
    async with EmbeddedHost.open(tmp_path / "xbd") as embedded_host:
        yield embedded_host
        assert embedded_host.hypervisor.mapped_pages == 0
        assert embedded_host.hypervisor.bound_ports == 0


@pytest.fixture
async def guest(host):
    async with GuestDomain.connect(host.directory, pages=64) as domain:
        yield domain
