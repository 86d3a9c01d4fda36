"""Rings, pages and grants that change while requests are under way; see scribbling.py."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from scribbling import scribble

pytestmark = pytest.mark.slow

SEEDS = max(20, settings().max_examples // 2)


@pytest.mark.parametrize("part", range(3))
async def test_scribbling_while_requests_are_under_way(field, part):
    batches = 0
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        try:
            batches += (await scribble(field, random.Random(seed), 5)).batches
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert batches > SEEDS
