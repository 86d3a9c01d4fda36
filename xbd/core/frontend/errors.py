"""What can go wrong on the guest's side."""

from __future__ import annotations

from xbd.core.errors import XbdError


class FrontendError(XbdError):
    """The backend refused the disk, went away, or broke the protocol."""


class RequestFailed(FrontendError):
    """A request was answered with something else than BLKIF_RSP_OKAY."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what} was answered with status {status}")
        self.status = status
