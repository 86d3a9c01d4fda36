"""Listening UNIX sockets in the filesystem."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from xbd.core.errors import ConfigError
from xbd.core.hostio.failures import shown

_BACKLOG: Final = 64


class SocketUnavailable(ConfigError):
    """The socket can't be made."""

    exit_code = 1


def listen(
    path: Path, mode: int = 0o600, *, what: str = "", other: str = "server"
) -> socket.socket:
    """A listening socket at `path`.  What a dead server left behind is replaced.

    Raises `SocketUnavailable` with one line, which calls the socket `what` and whoever else uses
    it another `other`.
    """
    try:
        _remove_stale(path, other)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            _bind(sock, path, mode)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        why = "the path is too long" if error.errno is None else error.strerror
        raise SocketUnavailable(f"cannot listen on {what}{shown(path)}: {why}") from None
    return sock


@contextmanager
def listening(path: Path, mode: int = 0o600) -> Iterator[socket.socket]:
    """As `listen`; the socket is closed and removed at the end."""
    with listen(path, mode) as sock:
        ours = path.lstat()
        try:
            yield sock
        finally:
            with suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), ours):  # not somebody else's by now
                    path.unlink()


def _bind(sock: socket.socket, path: Path, mode: int) -> None:
    # The mode holds from the first moment on: there is no time in which others could connect.
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)


def _remove_stale(path: Path, other: str) -> None:
    """Raises OSError if somebody answers at `path`."""
    if not path.is_socket():
        return
    taken = OSError(errno.EADDRINUSE, f"another {other} is using it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except BlockingIOError:
            raise taken from None
        else:
            raise taken
