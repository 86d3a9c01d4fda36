"""A listening UNIX socket in the filesystem."""

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


@contextmanager
def listening(path: Path, mode: int = 0o600) -> Iterator[socket.socket]:
    """A listening socket at `path`, which is removed at the end.

    What a dead server left behind is replaced.  Raises `SocketUnavailable` with one line.
    """
    try:
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            _bind(sock, path, mode)
            ours = path.lstat()
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        what = "the path is too long" if error.errno is None else error.strerror
        raise SocketUnavailable(f"cannot listen on {shown(path)}: {what}") from None
    try:
        with sock:
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


def _remove_stale(path: Path) -> None:
    """Raises OSError if somebody answers at `path`."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except BlockingIOError:
            raise OSError(errno.EADDRINUSE, "another server is using it") from None
        else:
            raise OSError(errno.EADDRINUSE, "another server is using it")
