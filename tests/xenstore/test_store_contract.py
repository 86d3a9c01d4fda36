"""The contract, against the embedded XenStore."""

from __future__ import annotations

import pytest
from xenstore_contract import StoreContract


class TestEmbeddedStore(StoreContract):
    @pytest.fixture
    def store_path(self, server):
        return server.path
