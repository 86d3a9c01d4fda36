"""What tests do without because their host stays on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any


def stay_on(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make nothing durable any more: it takes most of a test's time."""
    pwritev = os.pwritev

    def write(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        return pwritev(fd, buffers, offset)

    set_attribute(os, "pwritev", write)
    set_attribute(os, "fdatasync", lambda fd: None)
    set_attribute(os, "fsync", lambda fd: None)
