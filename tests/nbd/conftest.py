"""NBD servers in this process, on memory disks, with clients on socket pairs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("export_process", "nbd_client", "nbd_rig")

from nbd_rig import ENGINES  # noqa: E402

from xbd.core.nbd import server as server_module  # noqa: E402


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Each engine in turn; its name."""
    monkeypatch.setattr(server_module, "make_engine", ENGINES[request.param])
    return request.param
