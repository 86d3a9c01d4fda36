"""kill -9 of processes that write to an image: all that was answered is there, flushed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from qcow2_crashes import below_of
from qcow2_kills import Killer
from qcow2_recipes import NAMED

pytestmark = pytest.mark.slow

KILLS = 10


@pytest.mark.parametrize("name", ["4k", "over-two", "snapshots"])
def test_kills(tmp_path: Path, name: str) -> None:
    """Again and again on the same image."""
    made = NAMED[name].make(tmp_path)
    with Killer.start(made, below_of(made), 1) as killer:
        for _ in range(KILLS):
            killer.kill_one()
        killer.qemu_finds_leaks_at_most()
    assert killer.answered > 10 * KILLS
