"""For the drivers that come with xbd."""

from __future__ import annotations

import pytest

from xbd.core.hostio import locks


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that expect a busy disk need not wait for it as long as a daemon does."""
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.12)
