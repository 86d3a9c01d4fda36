"""What the host's errno values mean for a disk, and how they are told to people."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from xbd.core.errors import DeviceBroken, DriverError, MediaError, NoSpace, OpenFailed, Unsupported

_CLASSES: Final[dict[int, type[DriverError]]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EOPNOTSUPP: Unsupported,
    errno.ENODEV: DeviceBroken,
    errno.ENXIO: DeviceBroken,
    errno.EBADF: DeviceBroken,
    errno.ESTALE: DeviceBroken,
}


def shown(path: Path) -> str:
    """A path as it can stand in a one-line text, whatever bytes it is made of."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def describe(number: int) -> str:
    """An errno as an administrator reads it: ``Permission denied (errno 13, EACCES)``."""
    return f"{os.strerror(number)} (errno {number}, {errno.errorcode.get(number, '?')})"


def io_failure(what: str, number: int) -> DriverError:
    """The error for a request on an open disk that failed with this (positive) errno."""
    return _CLASSES.get(number, MediaError)(f"{what}: {describe(number)}", errno=number)


def open_failure(what: str, number: int, advice: str = "") -> OpenFailed:
    """The error for a disk that could not be opened; `advice` says what to do about it."""
    text = f"{what}: {describe(number)}"
    return OpenFailed(f"{text}; {advice}" if advice else text, errno=number)
