"""How a stage of a device's life ends."""

from __future__ import annotations

import enum
from typing import Final

from xbd.core.blkif.state import XenbusState

NEW: Final = (XenbusState.UNKNOWN, XenbusState.INITIALISING)
"""States that only the toolstack writes."""


class Outcome(enum.Enum):
    """Why it ended."""

    VANISHED = "its directory was removed"
    RENEWED = "the toolstack attached it anew"
    DETACHED = "the toolstack detached it"
    STOPPED = "the daemon stops"
    AGAIN = "XenStore has to be read anew"
