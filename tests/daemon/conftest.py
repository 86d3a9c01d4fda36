"""Daemons as processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for room in (HERE, HERE.parent / "driver"):
    sys.path.insert(0, str(room))
pytest.register_assert_rewrite("daemon_process")
