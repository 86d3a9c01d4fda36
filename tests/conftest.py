"""Shared test set-up: hypothesis profiles."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fast", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("longer", parent=settings.get_profile("fast"), max_examples=400)
settings.register_profile("thorough", parent=settings.get_profile("fast"), max_examples=2000)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fast")
settings.load_profile(PROFILE)

THOROUGH_SECONDS = 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Thousands of examples may take their time."""
    if PROFILE != "fast":
        for item in items:
            item.add_marker(pytest.mark.timeout(THOROUGH_SECONDS), append=False)
