"""Making files: never in another's place, whole or not at all, and durable with their names."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from xbd.core.errors import ConfigError, Unsupported
from xbd.core.hostio.failures import describe, io_failure, shown
from xbd.core.hostio.transfer import write_zero_bytes
from xbd.core.hostio.zero import fallocate
from xbd.core.units import GIB, MIB

_NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_MODE: Final = 0o644
_CANNOT_LINK: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
_CANNOT_RESERVE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A file that was not there before, open for reading and writing.

    At the end it is durable; if the block raises, it is removed.  Raises `ConfigError` if there
    is something of that name, `DriverError` for everything else.
    """
    fd = _create(path)
    try:
        yield fd
        os.fsync(fd)
        sync_directory(path.parent)
    except BaseException as error:
        # Somebody may have put another file there; that one stays.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.lstat()):
                path.unlink()
        if isinstance(error, OSError):
            raise io_failure(f"create {shown(path)}", error.errno or errno.EIO) from error
        raise
    finally:
        os.close(fd)


def _create(path: Path) -> int:
    try:
        return os.open(path, _NEW_FILE, _MODE)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        number = error.errno or errno.EIO
        if number == errno.ENOENT:
            raise ConfigError(
                f"cannot create {shown(path)}: there is no directory {shown(path.parent)}"
            ) from None
        if number in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EROFS):
            raise ConfigError(f"cannot create {shown(path)}: {describe(number)}") from None
        raise io_failure(f"create {shown(path)}", number) from error


def publish(path: Path, name: Path) -> None:
    """Give a finished file its `name` in the same directory, durably, and never in another's
    place.  Raises `ConfigError` if there is something of that name, `DriverError` otherwise.
    """
    try:
        try:
            os.link(path, name, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            require_absent(name)
            path.rename(name)
        else:
            path.unlink()
        sync_directory(name.parent)
    except FileExistsError:
        raise _exists(name) from None
    except OSError as error:
        raise io_failure(f"create {shown(name)}", error.errno or errno.EIO) from error


def _exists(path: Path) -> ConfigError:
    return ConfigError(f"{shown(path)} exists already: remove it first, or choose another name")


def require_absent(path: Path) -> None:
    """Raise `ConfigError` if there is something of that name."""
    if os.path.lexists(path):
        raise _exists(path)


def sync_directory(path: Path) -> None:
    """Make durable which files a directory has.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def reserve(path: Path, fd: int, offset: int, length: int, step: Callable[[int], None]) -> None:
    """Allocate a range of a file without writing to it; what is new there reads as zeroes.

    The file grows if need be.  `step` is told of bytes as they are done.  Raises `DriverError`.
    """
    for start in range(offset, offset + length, GIB):
        piece = min(GIB, offset + length - start)
        try:
            fallocate(fd, 0, start, piece)
        except OSError as error:
            number = error.errno or errno.EIO
            if number in _CANNOT_RESERVE:
                raise Unsupported(
                    f"the filesystem of {shown(path)} can't reserve space: "
                    "use preallocation=full, which writes zeroes"
                ) from None
            raise io_failure(f"reserve space in {shown(path)}", number) from error
        step(piece)


def fill(path: Path, fd: int, offset: int, length: int, step: Callable[[int], None]) -> None:
    """Write zeroes to a range.  `step`: as for `reserve`.  Raises `DriverError`."""
    for start in range(offset, offset + length, 8 * MIB):
        piece = min(8 * MIB, offset + length - start)
        try:
            write_zero_bytes(fd, start, piece)
        except OSError as error:
            raise io_failure(f"write zeroes to {shown(path)}", error.errno or errno.EIO) from error
        step(piece)
