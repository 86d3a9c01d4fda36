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
from data_paths import NATIVE, PYTHON, threads_of  # noqa: E402
from hostile_world import ATTACKER_PAGES, Battlefield, battlefield  # noqa: E402


@pytest.fixture(params=[PYTHON, NATIVE])
def threads(request):
    """What serves the rings: None for the data path in Python."""
    with threads_of(request.param, domain_pages=ATTACKER_PAGES) as threads:
        yield threads


@pytest.fixture
async def field(tmp_path, threads) -> Battlefield:
    """A host with a well-behaved guest on it, unharmed in the end.  Over each data path."""
    async with battlefield(tmp_path / "host", threads) as a_field:
        yield a_field


@pytest.fixture
async def python_field(tmp_path) -> Battlefield:
    """Over the data path in Python, to look into it."""
    async with battlefield(tmp_path / "host") as a_field:
        yield a_field


@pytest.fixture
async def world(tmp_path):
    """A whole daemon but for its process: store, hypervisor, supervisor."""
    async with embedded_world(tmp_path) as a_world:
        yield a_world
        await a_world.finish()


@pytest.fixture
async def any_world(tmp_path, threads):
    """Over each data path."""
    async with embedded_world(tmp_path, threads=threads) as a_world:
        yield a_world
        await a_world.finish()
