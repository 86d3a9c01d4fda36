"""A whole embedded host in one process: store, hypervisor, supervisor, toolstack, guests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("backend_world")

from backend_world import World, embedded_world  # noqa: E402
from data_paths import PYTHON, threads_of  # noqa: E402


@pytest.fixture
def threads(request):
    """What serves the rings; modules that look at each data path give a parameter."""
    with threads_of(getattr(request, "param", PYTHON)) as threads:
        yield threads


@pytest.fixture
async def world(tmp_path, threads):
    async with embedded_world(tmp_path, threads=threads) as a_world:
        yield a_world
        await a_world.finish()


@pytest.fixture
def log(world: World):
    return world.log
