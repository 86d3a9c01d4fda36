"""A daemon that serves an embedded host in a directory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "daemon"))


@pytest.fixture
async def serving(tmp_path):
    """The directory of a running daemon, which must end well."""
    from daemon_process import running

    directory = tmp_path / "host"
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves")
        yield directory
        assert await daemon.stop() == 0, daemon.said
        assert "Traceback" not in daemon.said
        assert "leak" not in daemon.said
