"""The control socket: how ``xbd list`` and its like ask a running daemon."""

from pathlib import Path
from typing import Final

DEFAULT_SOCKET: Final = Path("/run/xbd/control.sock")
SOCKET_NAME: Final = "control.sock"
"""In an embedded host's directory."""
