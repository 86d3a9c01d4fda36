"""What can go wrong with a client."""

from __future__ import annotations

from xbd.core.errors import XbdError


class BadClient(XbdError):
    """A client broke the protocol; nothing that it sends from here on can be understood."""
