"""The data path in C: threads that never wait for Python serve what drivers' extents cover."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

_MODULE: Final = "xbd.core.datapath.native._core"


def _load() -> tuple[Any, Any, str | None]:
    if sys.platform != "linux":
        return None, None, f"it is for Linux, and this is {sys.platform}"
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError:
        return (
            None,
            None,
            ("it was not built: when xbd was installed there was no C compiler, or XBD_NATIVE=0"),
        )
    except ImportError as error:
        return None, None, f"it can't be loaded: {error}"
    return module.ffi, module.lib, None


ffi: Any
lib: Any
why_not: str | None
"""Why there is no native data path here; None: there is one, in `ffi` and `lib`."""
ffi, lib, why_not = _load()
