"""Every way to a memory barrier."""

from __future__ import annotations

import platform

import pytest

from xbd.core.errors import HypervisorUnavailable
from xbd.core.hostio import fence


def test_this_machine_has_one():
    fence.full_fence()


def test_x86_needs_no_library(monkeypatch):
    monkeypatch.setattr(fence, "_libatomic_fence", lambda: None)
    for machine in ("x86_64", "AMD64", "i686"):
        fence.choose_fence(machine)()


def test_elsewhere_the_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(fence, "_libatomic_fence", lambda: None)
    with pytest.raises(HypervisorUnavailable, match=r"libatomic1$"):
        fence.choose_fence("aarch64")()


def test_the_library_is_preferred():
    if fence._libatomic_fence() is None:
        pytest.skip("libatomic is not installed")
    chosen = fence.choose_fence(platform.machine())
    assert type(chosen) is type(fence._libatomic_fence())
