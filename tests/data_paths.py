"""What serves the rings in tests that are made for each data path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xbd.core.datapath import native
from xbd.core.datapath.native.threads import HOST_PAGES, NativeThreads

PYTHON = "python"
NATIVE = "native"
NATIVE_PREADV = "native preadv"


@contextmanager
def threads_of(data_path: str, **options) -> Iterator[NativeThreads | None]:
    """I/O threads for as long as it takes; None for the data path in Python.

    In the end all of the guests' pages have to be given back.
    """
    if data_path == PYTHON:
        yield None
        return
    if native.why_not is not None:
        pytest.skip(f"no native data path: {native.why_not}")
    threads = NativeThreads(
        2, 20, engine="preadv" if data_path == NATIVE_PREADV else "uring", **options
    )
    try:
        yield threads
        assert threads.pages_left == HOST_PAGES
    finally:
        threads.close()
