"""What ``xbd image`` does to flat image files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from xbd.core.driver import (
    Backing,
    ConfigError,
    ImageFormat,
    ImageInfo,
    MapEntry,
    OpenFailed,
    Progress,
    choice,
    option,
)
from xbd.core.driver.image import no_progress
from xbd.core.hostio.failures import io_failure, open_failure, shown
from xbd.core.hostio.files import kind_of, open_file, size_of, stat_path
from xbd.core.hostio.holes import data_runs
from xbd.core.hostio.locks import lock_file
from xbd.core.hostio.newfile import fill, new_file, reserve

_SECTOR: Final = 512

OFF: Final = "off"
FALLOC: Final = "falloc"
FULL: Final = "full"


@attrs.frozen(kw_only=True)
class ImagefileCreateOptions:
    """``-o NAME=VALUE`` of ``xbd image create imagefile:...``."""

    preallocation: str = option(
        choice(OFF, FALLOC, FULL),
        default=OFF,
        help="off: one hole; falloc: its space is reserved; full: it is written with zeroes",
    )


class ImagefileFormat(ImageFormat):
    """Flat images.  They have nothing to check, and nothing behind them."""

    create_options = ImagefileCreateOptions

    def create(
        self,
        path: Path,
        size: int | None,
        options: ImagefileCreateOptions,
        *,
        backing: Backing | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Make a file of `size` bytes, rounded up to whole sectors."""
        if backing is not None:
            raise ConfigError("a flat image can't have a backing file: use qcow2")
        if size is None:
            raise ConfigError("a flat image needs a size")
        with new_file(path) as fd:
            _fit(path, fd, 0, _whole(size), options.preallocation, progress)

    def info(self, path: Path, *, share: bool = False) -> ImageInfo:
        """Of a block device, too: it may lie behind an image."""
        with _opened(path, writable=False, share=share) as fd:
            size = size_of(fd)
            return ImageInfo(
                path=path,
                format="raw",
                virtual_size=size - size % _SECTOR,
                actual_size=os.fstat(fd).st_blocks * 512,
            )

    def resize(
        self,
        path: Path,
        size: int,
        *,
        shrink: bool = False,
        preallocation: str = OFF,
        key_file: Path | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Cut the file off, or add to it."""
        if key_file is not None:
            raise ConfigError("a flat image is not encrypted")
        if preallocation not in (OFF, FALLOC, FULL):
            raise ConfigError(f"preallocation: {preallocation!r} is none of off, falloc, full")
        size = _whole(size)
        with _opened(path, writable=True) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{shown(path)} is not a regular file: resize the device itself")
            old = size_of(fd)
            if size < old and not shrink:
                raise ConfigError(
                    f"{shown(path)} has {old} bytes: to lose what lies behind {size}, say --shrink"
                )
            try:
                _fit(path, fd, old, size, preallocation, progress)
                os.fsync(fd)
            except BaseException as error:
                if size > old:
                    os.ftruncate(fd, old)
                if isinstance(error, OSError):
                    raise io_failure(f"resize {shown(path)}", error.errno or errno.EIO) from error
                raise

    def map(
        self, path: Path, *, image_dirs: Sequence[Path] | None = None, share: bool = False
    ) -> Iterator[MapEntry]:
        """Holes and data, as the filesystem tells."""
        with _opened(path, writable=False, share=share) as fd:
            at, size = 0, size_of(fd)
            while at < size:
                for length, data in data_runs(fd, at, size - at):
                    yield MapEntry(
                        start=at,
                        length=length,
                        depth=0,
                        present=True,
                        zero=not data,
                        data=data,
                        file=path,
                        offset=at,
                    )
                    at += length


def _whole(size: int) -> int:
    return size + -size % _SECTOR


def _fit(path: Path, fd: int, old: int, size: int, preallocation: str, progress: Progress) -> None:
    """Make a file of `old` bytes one of `size`."""
    total = max(0, size - old)
    done = 0

    def step(length: int) -> None:
        nonlocal done
        done += length
        progress(done, total)

    means: dict[str, Callable[..., None]] = {FALLOC: reserve, FULL: fill}
    if preallocation in means and total:
        means[preallocation](path, fd, old, total, step)
    os.ftruncate(fd, size)
    step(total - done)


@contextmanager
def _opened(path: Path, *, writable: bool, share: bool = False) -> Iterator[int]:
    status = stat_path(path)
    # Opening anything else can wait for ever.
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise OpenFailed(f"{shown(path)} is a {kind_of(status)}, not an image file")
    try:
        fd = open_file(path, writable=writable)
    except OSError as error:
        raise open_failure(f"cannot open {shown(path)}", error.errno or errno.EIO) from error
    try:
        if not share:
            lock_file(fd, shown(path), exclusive=writable)
        yield fd
    finally:
        os.close(fd)
