"""The contract, against Xen's own XenStore: XBD_TEST_XENSTORE=/run/xenstored/socket."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from xenstore_contract import StoreContract

REAL = os.environ.get("XBD_TEST_XENSTORE")
if not REAL:
    pytest.skip("XBD_TEST_XENSTORE names no XenStore", allow_module_level=True)


class TestRealStore(StoreContract):
    @pytest.fixture
    def store_path(self):
        return Path(REAL)
