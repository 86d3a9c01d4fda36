"""The C of the native data path as a library for tests, function by function.

The extension that is installed exports what Python needs and no more; here every function of the
headers can be called, from a library that is made once for each state of the sources.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import cffi
import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
SOURCES: Final = ROOT / "xbd" / "core" / "datapath" / "native" / "src"
CACHE: Final = ROOT / "build" / "tests-native"
FLAGS: Final = (
    *("-std=gnu11", "-O2", "-g", "-pthread", "-fPIC", "-shared", "-Wl,-Bsymbolic"),
    *("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"),
)


def declarations(*headers: str) -> str:
    """What headers of the data path declare, for `native_library`: all but the preprocessor's."""
    lines = "\n".join((SOURCES / name).read_text() for name in headers).splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def native_library(sources: Sequence[str], cdef: str) -> tuple[Any, Any]:
    """ffi and library of these sources, such as ``blkif.c``; skips where there is no compiler."""
    return _open(tuple(sorted(sources)), cdef)


@functools.cache
def _open(sources: tuple[str, ...], cdef: str) -> tuple[Any, Any]:
    ffi = cffi.FFI()
    ffi.cdef(cdef)
    return ffi, ffi.dlopen(str(_build(sources)))


def _build(sources: tuple[str, ...]) -> Path:
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        pytest.skip("no C compiler: the native data path is not tested by itself")
    made_from = hashlib.sha256(repr((compiler, FLAGS, sources)).encode())
    for path in (*(SOURCES / name for name in sources), *sorted(SOURCES.glob("*.h"))):
        made_from.update(f"\0{path.name}\0".encode() + path.read_bytes())
    library = CACHE / f"{made_from.hexdigest()[:32]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Others may make the same at the same time: whoever renames last wins, and all are alike.
        new = library.with_suffix(f".{os.getpid()}.new")
        command = [compiler, *FLAGS, *(str(SOURCES / name) for name in sources), "-o", str(new)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert made.returncode == 0, made.stderr
        new.replace(library)
    return library
