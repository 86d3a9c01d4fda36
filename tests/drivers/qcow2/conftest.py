"""For tests of the qcow2 driver."""

from __future__ import annotations

import pytest
from qcow2_power import stay_on


@pytest.fixture
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host stays on: nothing waits for its disk.

    What a flush is good for is shown by replaying crashes, not by the host's disk.
    """
    stay_on(monkeypatch.setattr)
