"""The sockets of the embedded XenStore in its directory, and the lock that keeps it alone there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xbd.core.errors import ConfigError
from xbd.core.units import Domid

DOM0_SOCKET: Final = "xenstored.socket"
_LOCK: Final = "xenstored.lock"
_BACKLOG: Final = 64


def socket_path(directory: Path, domid: Domid) -> Path:
    """Where this domain's clients connect."""
    return directory / (DOM0_SOCKET if domid == 0 else f"xenstored-{domid}.socket")


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Make sure that no other XenStore lives in `directory`, and clear a dead one's sockets.

    Raises `ConfigError`.
    """
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"can't make XenStore's sockets in {directory}: {error.strerror}"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(directory) from None
        if answers(directory / DOM0_SOCKET):
            raise _taken(directory)
        for path in directory.glob("xenstored*.socket"):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        yield
    finally:
        os.close(lock)


def answers(path: Path) -> bool:
    """Whether a live server listens on this socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            result = probe.connect_ex(str(path))
        except OSError:  # not an errno, but a path that no socket can have
            return False
    return result in (0, errno.EAGAIN, errno.EINPROGRESS)


def listen(path: Path) -> socket.socket:
    """A listening socket that only this user may connect to.  Raises `ConfigError`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(OSError):  # Linux makes the node with these; elsewhere chmod does
            os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"can't listen on {path}: {error.strerror or error}") from error
    return listener


def _taken(directory: Path) -> ConfigError:
    return ConfigError(
        f"another XenStore answers on {directory / DOM0_SOCKET}; use that one, or stop it first"
    )
