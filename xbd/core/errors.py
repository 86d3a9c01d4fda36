"""Every error xbd raises on purpose, and what each one means for the request, device or daemon.

Parsing what a guest wrote raises only `GuestError`, a driver raises only `DriverError`, the two
boundaries raise only `BoundaryError`, and what an administrator got wrong is a `ConfigError`.
Anything else is a bug: it is logged with its traceback, and the request is answered ERROR.
"""

from __future__ import annotations

import enum
import errno as errno_module
from typing import ClassVar


class Disposition(enum.IntEnum):
    """What an error does, from harmless to final; of several, the greatest is carried out."""

    ANSWER_UNSUPPORTED = 0
    """Answer this request with BLKIF_RSP_EOPNOTSUPP."""
    ANSWER_ERROR = 1
    """Answer this request with BLKIF_RSP_ERROR."""
    CLOSE_DEVICE = 2
    """Close this device; the others never notice."""
    REFUSE = 3
    """Refuse the configuration or the command; nothing was changed."""
    STOP_DAEMON = 4
    """Nothing can be served any more."""


class XbdError(Exception):
    """The root of all deliberate errors.  Its text is one line, fit for an administrator."""

    disposition: ClassVar[Disposition] = Disposition.CLOSE_DEVICE


class ConfigError(XbdError):
    """A user's input is wrong.  The text says what, and what to do."""

    disposition = Disposition.REFUSE
    exit_code: ClassVar[int] = 2


class OptionError(ConfigError):
    """Unknown, missing or malformed driver options."""


class DriverNotFound(ConfigError):
    """No installed package offers a driver of that name."""


class DriverConflict(ConfigError):
    """Two installed packages offer a driver of the same name."""


class DriverLoadError(ConfigError):
    """A driver's package could not be imported or does not offer a driver."""


class DriverApiMismatch(DriverLoadError):
    """A driver was written for another version of the driver interface."""


class GuestError(XbdError):
    """A guest wrote something that the protocol forbids."""


class BadRequest(GuestError):
    """A malformed request."""

    disposition = Disposition.ANSWER_ERROR


class Unoffered(GuestError):
    """A request for a feature that the backend has not offered."""

    disposition = Disposition.ANSWER_UNSUPPORTED


class RingCorrupt(GuestError):
    """Ring indices that no correct frontend writes; the ring can't be used any further."""


class BadNegotiation(GuestError):
    """A frontend's XenStore keys are missing, malformed or out of bounds."""


class DriverError(XbdError):
    """A storage driver's failure, with the errno that describes it best."""

    disposition = Disposition.ANSWER_ERROR

    def __init__(self, message: str, *, errno: int = errno_module.EIO) -> None:
        super().__init__(message)
        self.errno = errno


class Unsupported(DriverError):
    """The device cannot do this operation."""

    disposition = Disposition.ANSWER_UNSUPPORTED

    def __init__(self, message: str, *, errno: int = errno_module.EOPNOTSUPP) -> None:
        super().__init__(message, errno=errno)


class MediaError(DriverError):
    """Reading or writing failed for this range; the device lives on."""


class NoSpace(MediaError):
    """The host's storage is full; nothing already written is lost."""

    def __init__(self, message: str, *, errno: int = errno_module.ENOSPC) -> None:
        super().__init__(message, errno=errno)


class DeviceBroken(DriverError):
    """The device cannot be used any further."""

    disposition = Disposition.CLOSE_DEVICE


class OpenFailed(DriverError):
    """A disk could not be opened.  The text names it, the errno, and what to do."""

    disposition = Disposition.CLOSE_DEVICE


class BoundaryError(XbdError):
    """The hypervisor or XenStore refused something."""


class GrantFailed(BoundaryError):
    """A granted page could not be mapped or copied."""

    disposition = Disposition.ANSWER_ERROR


class PortFailed(BoundaryError):
    """An event channel could not be bound."""


class HypervisorUnavailable(ConfigError):
    """No Xen here, its library is missing, or no permission to use it."""

    exit_code = 1


class HypervisorLost(BoundaryError):
    """The hypervisor interface stopped working."""

    disposition = Disposition.STOP_DAEMON


class StoreUnavailable(ConfigError):
    """XenStore can't be reached at start."""

    exit_code = 1


class StoreError(BoundaryError):
    """XenStore refused a request; `errno` says why."""

    def __init__(self, message: str, *, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class StoreLost(BoundaryError):
    """The connection to XenStore broke.  The store reconnects by itself; see `Store.watch`."""
