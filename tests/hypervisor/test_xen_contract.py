"""The contract, kept by Xen.  Needs a dom0 (see xen_world.py); there, with pytest-trio alone:

XBD_TEST_XEN=1 python3 -m pytest --noconftest -o trio_mode=true test_xen_contract.py
"""

from __future__ import annotations

import os

import pytest
from hypervisor_contract import CHECKS

if os.environ.get("XBD_TEST_XEN") != "1":
    pytest.skip("needs a Xen dom0: set XBD_TEST_XEN=1", allow_module_level=True)

from xen_world import XenWorld


@pytest.fixture
def world():
    xen_world = XenWorld()
    try:
        yield xen_world
        assert xen_world.hypervisor.mapped_pages == 0
        assert xen_world.hypervisor.bound_ports == 0
    finally:
        xen_world.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(world, check):
    await check(world)
