"""The log's rate limit."""

from __future__ import annotations

from xbd.core.ratelimit import RateLimit


def test_a_burst_passes_and_the_rest_is_counted():
    now = [0.0]
    limit = RateLimit(burst=2, seconds=1.0, clock=lambda: now[0])
    assert [limit.allows() for _ in range(5)] == [0, 0, None, None, None]
    now[0] = 1.0
    assert limit.allows() == 3
    assert limit.allows() == 0
    assert limit.allows() is None
