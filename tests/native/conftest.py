"""The native data path as a library; see `native_build`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for room in (HERE, HERE.parent / "hostile"):
    sys.path.insert(0, str(room))
pytest.register_assert_rewrite("differential", "hostile_world")

from native_build import SOURCES, declarations  # noqa: E402
from native_build import native_library as make_library  # noqa: E402


@pytest.fixture(scope="session")
def native_library():
    """`native_build.native_library`: ffi and library of some sources and declarations."""
    return make_library


@pytest.fixture(scope="session")
def core_library():
    """ffi and library of all there is, with the declarations of api.h."""
    return make_library([path.name for path in SOURCES.glob("*.c")], declarations("api.h"))
