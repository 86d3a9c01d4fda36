"""What an image names: the images behind it, and its external data file.

Source: QEMU's docs/interop/qcow2.rst, "Header" (backing_file_offset) and "Header extensions"
(backing file format name, external data file name).
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from xbd.core.driver import HostExtent, OpenFailed, ReadRequest
from xbd.core.hostio.failures import io_failure, shown
from xbd.core.hostio.files import DirectAlignment
from xbd.core.hostio.holes import data_runs
from xbd.drivers.qcow2.confined import named_path, open_confined
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host, Transfer
from xbd.drivers.qcow2.image import Backing
from xbd.drivers.qcow2.layout import SECTOR
from xbd.drivers.qcow2.offline import read_header

MAX_IMAGES: Final = 200
"""In one chain.  Reading through them is a recursion."""

FORMATS: Final = ("raw", "qcow2")

MAX_RUNS: Final = 65536
"""Data and holes that one call tells of; what comes after them counts as data."""

MakeImage = Callable[[Host, Header, Backing | None], Backing]
"""``make_image(host, header, backing)``: a qcow2 image, which owns both from then on; they stay
open if it raises."""


def open_backing(
    host: Host,
    header: Header,
    make_image: MakeImage,
    *,
    image_dirs: Sequence[Path] | None,
    backing_format: str | None = None,
    direct: bool = False,
    lock: bool = True,
) -> Backing | None:
    """Open, read-only, all images behind the one open as `host`; None: there is none.

    `backing_format` is for the first of them, instead of what the header says; no format is ever
    guessed, because a guest can write into a raw image whatever it likes.  `direct`: past the page
    cache, those that take what is aligned for `host`.  Raises `OpenFailed` or `CorruptImage`;
    nothing stays open then.
    """
    units = host.alignment if direct else None
    open_file = partial(_open_file, image_dirs=image_dirs, units=units, lock=lock)
    behind: list[tuple[Host, Header | None]] = []
    backing: Backing | None = None
    try:
        seen = [os.fstat(host.fd)]
        above, named = host, header
        while named.backing_file is not None:
            if len(behind) == MAX_IMAGES:
                raise OpenFailed(
                    f"{shown(host.path)} has more than {MAX_IMAGES} images behind it",
                    errno=errno.ELOOP,
                )
            kind = _format_of(above, named, backing_format if above is host else None)
            above = _open_next(above, named.backing_file, seen, open_file)
            behind.append((above, None))
            if kind == "raw":
                break
            named = read_header(above)
            behind[-1] = (above, named)
        while behind:
            lowest, its_header = behind[-1]
            if its_header is None:
                backing = RawBacking(lowest)
            else:
                backing = make_image(lowest, its_header, backing)
            behind.pop()
    except BaseException:
        for opened, _ in behind:
            opened.close()
        if backing is not None:
            backing.close()
        raise
    return backing


def _format_of(host: Host, header: Header, option: str | None) -> str:
    kind = header.backing_format if option is None else option
    if kind is None:
        image, name = shown(host.path), shown(Path(header.backing_file or ""))
        command = shlex.join(["qemu-img", "rebase", "-u", "-F", "FORMAT", "-b", name, image])
        raise OpenFailed(
            f"{image} does not say of which format its backing file {name} is, and that is never "
            f"guessed: write it into the image ({command}), or set backing-format={_CHOICE}",
            errno=errno.EINVAL,
        )
    if kind not in FORMATS:
        raise OpenFailed(
            f"{shown(host.path)} has a backing file of the format {kind!r}; only {_CHOICE} is "
            "supported",
            errno=errno.EOPNOTSUPP,
        )
    return kind


_CHOICE: Final = "|".join(FORMATS)


def _open_next(
    above: Host, name: str, seen: list[os.stat_result], open_file: Callable[[Path, str], Host]
) -> Host:
    what = f"{shown(above.path)}: the backing file"
    path = named_path(name, above.path.parent, what)
    # Before it is opened as well: a lock of our own would be in the way.
    _require_new(path, seen)
    opened = open_file(path, what)
    try:
        _require_new(path, seen, opened.fd)
    except BaseException:
        opened.close()
        raise
    seen.append(os.fstat(opened.fd))
    return opened


def _open_file(
    path: Path,
    what: str,
    *,
    image_dirs: Sequence[Path] | None,
    units: DirectAlignment | None,
    lock: bool,
) -> Host:
    opened = open_confined(path, what, image_dirs, direct=units is not None, lock=lock)
    needs = opened.alignment
    if units is None or (needs.offset <= units.offset and needs.memory <= units.memory):
        return opened
    opened.close()
    return open_confined(path, what, image_dirs, lock=lock)


def _require_new(path: Path, seen: list[os.stat_result], fd: int | None = None) -> None:
    try:
        status = os.stat(path if fd is None else fd)  # noqa: PTH116 - or of a descriptor
    except OSError:
        return  # opening it says what is wrong
    if any(_same_file(status, other) for other in seen):
        raise OpenFailed(
            f"the backing files go round in a circle: {shown(path)} comes twice", errno=errno.ELOOP
        )


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """The same device counts by whichever of its nodes."""
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def open_data_file(
    host: Host,
    header: Header,
    *,
    image_dirs: Sequence[Path] | None,
    override: Path | None = None,
    writable: bool,
    direct: bool = False,
    lock: bool = True,
) -> Host:
    """The external data file of the image open as `host`.

    `override` comes from the administrator, so it may lie anywhere.  Raises `OpenFailed`.
    """
    what = f"{shown(host.path)}: the data file"
    name = header.data_file
    if override is not None:
        path, image_dirs = override, None
    elif name is not None:
        path = named_path(name, host.path.parent, what)
    else:
        raise OpenFailed(
            f"{shown(host.path)} does not name its data file: set data-file=/PATH",
            errno=errno.ENOENT,
        )
    _require_other(path, host)
    opened = open_confined(path, what, image_dirs, writable=writable, direct=direct, lock=lock)
    try:
        _require_other(path, host, opened.fd)
    except BaseException:
        opened.close()
        raise
    return opened


def _require_other(path: Path, host: Host, fd: int | None = None) -> None:
    try:
        status = os.stat(path if fd is None else fd)  # noqa: PTH116 - or of a descriptor
    except OSError:
        return  # opening it says what is wrong
    if _same_file(status, os.fstat(host.fd)):
        raise OpenFailed(f"{shown(path)} names itself as its data file", errno=errno.ELOOP)


class RawBacking:
    """A flat image, whose bytes are the disk's."""

    def __init__(self, host: Host) -> None:
        """Owns `host` from now on."""
        self._host = host
        self._size = host.size()

    @property
    def size(self) -> int:
        """When it was opened."""
        return self._size

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers; behind its end there are zeroes."""
        self._host.readv(offset, buffers)

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Read all; each request's `error` says how it went."""
        transfers = [Transfer(request.offset, request.buffers) for request in requests]
        for request, failure in zip(requests, self._host.read_transfers(transfers), strict=True):
            request.error = failure

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """The range in pieces: length, and whether it reads as zeroes for sure."""
        runs: list[tuple[int, bool]] = []
        end = offset + length
        inside = min(end, max(self._size, offset))
        try:
            while offset < inside and len(runs) < MAX_RUNS:
                for size, data in data_runs(self._host.fd, offset, inside - offset):
                    runs.append((size, not data))
                    offset += size
        except OSError as error:
            raise io_failure(
                f"look for holes in {shown(self._host.path)}", error.errno or errno.EIO
            ) from error
        if offset < inside:
            runs.append((inside - offset, False))
        if inside < end:
            runs.append((end - inside, True))
        return runs

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether a range reads as zeroes for sure."""
        return all(zero for _, zero in self.status(offset, length))

    def resolve(self, offset: int, length: int) -> HostExtent | None:
        """Where the bytes from `offset` on lie: all that direct I/O can read."""
        unit = max(SECTOR, self._host.alignment.offset)
        rest = self._size - self._size % unit - offset
        if rest <= 0:
            return None
        return HostExtent(fd=self._host.fd, offset=offset, length=rest)

    def resolve_all(self, offset: int, length: int) -> list[HostExtent]:
        """As `resolve`, which tells all."""
        extent = self.resolve(offset, length)
        return [] if extent is None else [extent]

    def zeroes(self, offset: int, length: int) -> int:
        """Behind the end alone: where there are holes is known to the filesystem."""
        return length if offset >= self._size else 0

    def in_memory(self, offset: int, length: int) -> bool:
        """There is nothing to know."""
        return True

    def load(self, offset: int, length: int) -> None:
        """There is nothing to load."""

    def close(self) -> None:
        """Idempotent."""
        self._host.close()
