"""How the extension is made: `setup.py` runs this through cffi."""

from __future__ import annotations

from pathlib import Path

import cffi

_SOURCES = "xbd/core/datapath/native/src"

builder = cffi.FFI()
builder.cdef((Path(__file__).parent / "src" / "api.h").read_text())
builder.set_source(
    "xbd.core.datapath.native._core",
    '#include "api_types.h"',
    sources=sorted(
        f"{_SOURCES}/{path.name}" for path in (Path(__file__).parent / "src").glob("*.c")
    ),
    depends=sorted(
        f"{_SOURCES}/{path.name}" for path in (Path(__file__).parent / "src").glob("*.h")
    ),
    include_dirs=[_SOURCES],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-pthread", "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    # Without a compiler everything else is installed: there is a data path in Python.
    optional=True,
)
