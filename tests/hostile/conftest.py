"""Guests that want to do harm; their tools live beside this file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for room in (HERE, HERE.parent / "backend"):
    sys.path.insert(0, str(room))
pytest.register_assert_rewrite("hostile_world", "ring_fuzz", "backend_world")

from backend_world import embedded_world  # noqa: E402
from hostile_world import Battlefield, battlefield  # noqa: E402


@pytest.fixture
async def field(tmp_path) -> Battlefield:
    """A host with a well-behaved guest on it; it must be unharmed in the end."""
    async with battlefield(tmp_path / "host") as a_field:
        yield a_field


@pytest.fixture
async def world(tmp_path):
    """A whole daemon but for its process: store, hypervisor, supervisor."""
    async with embedded_world(tmp_path) as a_world:
        yield a_world
        await a_world.finish()
