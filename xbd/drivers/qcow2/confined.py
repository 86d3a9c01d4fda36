"""Opening files that an image names.

Whoever made an image chose these names, so they are followed into known directories alone, and to
nothing but regular files and block devices.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xbd.core.driver import OpenFailed
from xbd.core.hostio.failures import open_failure, shown
from xbd.core.hostio.files import kind_of, stat_path
from xbd.drivers.qcow2.host import Host, open_host

_FILE_PROTOCOL: Final = "file:"
_OPEN_FILES: Final = "/proc/self/fd"


def named_path(name: str, directory: Path, what: str) -> Path:
    """The path that a name in an image means; relative names begin in the image's `directory`.

    As for QEMU, a colon before the first slash makes a protocol; only ``file:`` with an absolute
    path is known here.  Raises `OpenFailed`; `what` is what is named, for its text.
    """
    path = name
    if name.startswith(f"{_FILE_PROTOCOL}/"):
        path = name.removeprefix(_FILE_PROTOCOL)
    elif ":" in name.partition("/")[0]:
        raise OpenFailed(
            f"{what} is named {name!r}, by a protocol: only paths are supported (a relative one "
            "that has a colon begins with ./)",
            errno=errno.EPROTONOSUPPORT,
        )
    if not path or "\0" in path:
        raise OpenFailed(f"{what} is named {name!r}, which is no path", errno=errno.EINVAL)
    return directory / path


def open_confined(
    path: Path,
    what: str,
    image_dirs: Sequence[Path] | None,
    *,
    writable: bool = False,
    direct: bool = False,
    lock: bool = True,
) -> Host:
    """As `open_host`, for a file that lies, with all links followed, in one of the directories.

    `image_dirs` None: anywhere.  `what` is what it is to the image, for the texts of `OpenFailed`.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise open_failure(
            f"cannot open {what} {shown(path)}", error.errno or errno.EIO, "is it still there?"
        ) from None
    allowed = None if image_dirs is None else [Path(os.path.realpath(each)) for each in image_dirs]
    _require_inside(path, real, what, allowed)
    _require_kind(path, stat_path(real), what)
    host = open_host(real, writable=writable, direct=direct, lock=lock)
    try:
        # The names may have come to mean something else meanwhile.  What was opened says.
        _require_inside(path, _where(host.fd, real), what, allowed)
        _require_kind(path, os.fstat(host.fd), what)
    except BaseException:
        host.close()
        raise
    host.path = path
    return host


def _require_inside(path: Path, real: Path, what: str, allowed: list[Path] | None) -> None:
    if allowed is None or any(real.is_relative_to(directory) for directory in allowed):
        return
    link = "" if real == path else f" (that is {shown(real)})"
    raise OpenFailed(
        f"{what} {shown(path)}{link} is not in a directory where images may name files: add its "
        "directory to image_dirs in the configuration's [backend] (xbd export: --image-dirs)",
        errno=errno.EACCES,
    )


def _require_kind(path: Path, status: os.stat_result, what: str) -> None:
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise OpenFailed(
            f"{what} {shown(path)} is a {kind_of(status)}, not a file or a block device",
            errno=errno.EINVAL,
        )


def _where(fd: int, path: Path) -> Path:
    """Where the open file lies: the kernel knows; without /proc, `path` is asked once more."""
    try:
        return Path(os.readlink(f"{_OPEN_FILES}/{fd}"))  # noqa: PTH115 - as `Path.readlink`
    except OSError:
        return Path(os.path.realpath(path))
