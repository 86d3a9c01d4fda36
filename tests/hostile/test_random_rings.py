"""Random rings against a second opinion; see ring_fuzz.py.

The seeds are always the same; `tests/fuzz/fuzz_ring.py` goes on with others for as long as it may.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from ring_fuzz import attack

SEEDS = max(20, settings().max_examples // 2)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
async def test_random_guests_get_what_they_asked_for_and_no_more(field, part):
    requests = 0
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        try:
            requests += (await attack(field, random.Random(seed), 6)).requests
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert requests > 10 * SEEDS
