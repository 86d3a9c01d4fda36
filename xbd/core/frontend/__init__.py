"""A guest in user space: negotiates with a backend and drives the front half of its rings."""

from xbd.core.frontend.device import BlockFrontend, connect
from xbd.core.frontend.errors import FrontendError, RequestFailed
from xbd.core.frontend.options import FrontendOptions
from xbd.core.frontend.toolstack import AttachFailed, DiskLine, Toolstack

__all__ = [
    "AttachFailed",
    "BlockFrontend",
    "DiskLine",
    "FrontendError",
    "FrontendOptions",
    "RequestFailed",
    "Toolstack",
    "connect",
]
