"""Fixtures of the driver room."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xbd.core.driver import Capability, Concurrency, DeviceAccess, Geometry
from xbd.core.driver.testing import ALL_CAPABILITIES, MemoryDevice

AccessMaker = Callable[..., DeviceAccess]


@pytest.fixture
def make_access() -> AccessMaker:
    """Makes a `DeviceAccess` over a strict memory device."""

    def make(
        size: int = 1 << 20,
        *,
        capabilities: Capability = ALL_CAPABILITIES,
        concurrency: Concurrency = Concurrency.PARALLEL,
        writable: bool = True,
        wrap: Callable[[MemoryDevice], object] = lambda device: device,
        **geometry: int,
    ) -> DeviceAccess:
        device = MemoryDevice(
            size, geometry=Geometry(size=size, **geometry), capabilities=capabilities
        )
        return DeviceAccess(
            wrap(device),  # type: ignore[arg-type]
            device_id="xbdback1i51712",
            concurrency=concurrency,
            writable=writable,
        )

    return make
