"""XenStores for the tests of this room."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from xbd.core.xenstore.server import EmbeddedXenStore


@pytest.fixture
def store_dir():
    """Short enough a path for UNIX sockets, whatever the test's name."""
    with tempfile.TemporaryDirectory(prefix="xs-") as directory:
        yield Path(directory)


@pytest.fixture
async def server(store_dir):
    async with EmbeddedXenStore.serve(store_dir) as embedded:
        yield embedded


@pytest.fixture
def tools_environment(server):
    """For Debian's xenstore-read and its siblings."""
    return {**os.environ, "XENSTORED_PATH": str(server.path)}
