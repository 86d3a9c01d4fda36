"""What the tests of blkif share: the ABIs, generous limits."""

from __future__ import annotations

import pytest

from xbd.core.blkif import ARM, X86_32, X86_64, Limits

ALL_ABIS = (X86_64, X86_32, ARM)


@pytest.fixture(params=ALL_ABIS, ids=lambda abi: abi.name)
def abi(request):
    return request.param


@pytest.fixture
def limits():
    """A disk of 1 MiB that offers everything."""
    return Limits(
        size=1 << 20,
        logical_block=512,
        read_only=False,
        flush=True,
        barrier=True,
        discard=True,
        discard_secure=True,
        max_indirect_segments=1024,
    )
