"""The status that each grant operation ends with (xen/include/public/grant_table.h)."""

from __future__ import annotations

import enum


class GrantStatus(enum.IntEnum):
    """GNTST_*: what `Hypervisor.copy_grants` answers for each copy."""

    OKAY = 0
    GENERAL_ERROR = -1
    """Not granted to us, or granted read-only and asked for writing."""
    BAD_DOMAIN = -2
    BAD_GNTREF = -3
    """No such entry in the guest's grant table."""
    BAD_HANDLE = -4
    BAD_VIRT_ADDR = -5
    BAD_DEV_ADDR = -6
    NO_DEVICE_SPACE = -7
    PERMISSION_DENIED = -8
    BAD_PAGE = -9
    BAD_COPY_ARG = -10
    """The copy would cross the end of the page."""
    ADDRESS_TOO_BIG = -11
    EAGAIN = -12
    NO_SPACE = -13
