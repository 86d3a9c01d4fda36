"""Where XenStore is reached on this host, and how to open it.

Domain 0 has xenstored's UNIX socket; a driver domain has the kernel's device, which passes the
same packets on.  Which of the two a path is, `stat` tells.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from pyxs.connection import UnixSocketConnection, XenBusConnection

from xbd.core.errors import StoreUnavailable

_RUN_SOCKET: Final = Path("/run/xenstored/socket")

_ADVICE: Final = {
    errno.ENOENT: "is xenstored running? XENSTORED_PATH can name another place",
    errno.EACCES: "run as root",
    errno.EPERM: "run as root",
    errno.ECONNREFUSED: "the socket is there, but nobody answers; start xenstored",
    errno.EAGAIN: "xenstored does not accept connections; look whether it hangs",
    errno.ENODEV: "this kernel does not run under Xen",
    errno.ENXIO: "this kernel does not run under Xen",
}


def default_store_path() -> Path:
    """``$XENSTORED_PATH``, else the socket, else the device; the first of these that exists.

    Where nothing exists, the socket: `StoreClient.connect` then says what is missing.
    """
    if os.environ.get("XENSTORED_PATH"):
        return Path(os.environ["XENSTORED_PATH"])
    candidates = [
        Path(UnixSocketConnection().path),
        _RUN_SOCKET,
        Path(XenBusConnection().path),
        Path("/dev/xen/xenbus"),
        Path("/proc/xen/xenbus"),
    ]
    return next((path for path in candidates if path.exists()), candidates[0])


def is_device(path: Path) -> bool:
    """Whether XenStore is reached through the kernel there.

    Linux sends a request from the buffer into which the next `write` goes, whenever it comes to
    it: requests that do not wait for each other's answers are mixed up.
    """
    return path.is_char_device()


def open_store(path: Path) -> int:
    """A non-blocking descriptor connected to XenStore.  Raises `OSError`.

    Linux's device waits for xenstored's answer within `write` when a watch is set or given up,
    whatever its flags say; a hang of xenstored is then noticed late.
    """
    mode = path.stat().st_mode
    if stat.S_ISCHR(mode):
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.ENOTSOCK, "neither a socket nor a device", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        connection.connect(str(path))
        return connection.detach()


def unavailable(path: Path, error: OSError) -> StoreUnavailable:
    """What is wrong and what to do, in one line."""
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0)
    return StoreUnavailable(
        f"can't reach XenStore at {path}: {reason}" + (f" ({advice})" if advice else "")
    )
