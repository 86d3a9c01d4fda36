"""What comes out of a driver's code, made into the errors that the core knows."""

from __future__ import annotations

import errno
from typing import Final

from xbd.core.errors import DriverError, OpenFailed
from xbd.core.hostio.failures import io_failure, open_failure

_ADVICE: Final = {
    errno.EBUSY: "it is in use: detach it from where it is used (another guest, a mount), "
    "or attach it read-only",
    errno.EAGAIN: "it is in use: another process holds its lock",
    errno.ENOENT: "check the path",
    errno.EACCES: "the daemon's user may not open it: check owner, mode and security policy",
    errno.EPERM: "the daemon may not do this: check its privileges",
    errno.EROFS: "attach it read-only",
    errno.EISDIR: "a disk is a file or a block device, not a directory",
    errno.ENXIO: "no such device: is its driver loaded, the volume active?",
    errno.ENODEV: "no such device: is its driver loaded, the volume active?",
    errno.ENOMEDIUM: "there is no medium in the drive",
    errno.EMFILE: "raise the daemon's limit of open files (LimitNOFILE=)",
    errno.ELOOP: "too many symbolic links",
}


def request_error(what: str, error: Exception) -> DriverError | None:
    """The `DriverError` for what a driver's method raised; None: no driver may raise that.

    Of an exception group (from a nursery in the driver) the most serious member counts.
    """
    if isinstance(error, DriverError):
        return error
    if isinstance(error, OSError):
        return io_failure(what, error.errno or errno.EIO)
    if isinstance(error, ExceptionGroup):
        members = [request_error(what, member) for member in error.exceptions]
        known = [member for member in members if member is not None]
        if len(known) == len(members):
            return max(known, key=lambda member: member.disposition)
    return None


def open_error(disk: str, error: Exception) -> DriverError | None:
    """As `request_error`, for what a driver's `open` raised: always an `OpenFailed`."""
    if isinstance(error, OpenFailed):
        return error
    if isinstance(error, OSError):
        number = error.errno or errno.EIO
        return open_failure(f"cannot open {disk}", number, _ADVICE.get(number, ""))
    known = request_error(f"cannot open {disk}", error)
    if known is None or isinstance(known, OpenFailed):
        return known
    return OpenFailed(f"cannot open {disk}: {known}", errno=known.errno)
