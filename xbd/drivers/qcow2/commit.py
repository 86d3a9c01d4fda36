"""Writing what an image has into the one behind it.

Until the lower image has all of it, durably, the upper one keeps it; then it is emptied by one
write of its header.  Killed before, the disk reads as it did, whatever the lower image has got;
killed after, clusters may be leaked (see `switch`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from xbd.core.driver import ConfigError, Progress, WriteRequest
from xbd.core.driver.image import no_progress
from xbd.core.hostio.failures import shown
from xbd.core.units import MIB
from xbd.drivers.qcow2.chain import FORMATS
from xbd.drivers.qcow2.confined import named_path, open_confined
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host, Transfer
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.offline import opened_file, read_header
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.sizing import set_size
from xbd.drivers.qcow2.switch import Change, make_room, table_clusters
from xbd.drivers.qcow2.tables import Kind
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

_AT_A_TIME: Final = 64 * MIB
"""Of the disk: looked at, and told of as progress."""

_LONGEST: Final = 2 * MIB
_BATCH: Final = 16 * MIB
"""Of data, written together: that costs one flush."""

Data = tuple[int, memoryview]
"""An offset on the disk, and what is to be there."""


def commit(path: Path, *, progress: Progress = no_progress) -> None:
    """See `ImageFormat.commit`."""
    # Before anything is opened for writing, which may change things in it.
    with opened_file(path, writable=False) as host:
        header = read_header(host)
    _require_committable(path, header)
    image = open_image(path, Wishes(writable=True, with_backing=False))
    try:
        target = _open_below(image)
        try:
            if target.size < image.size:
                target.grow(image.size)
            _copy(image, target, progress)
            target.flush()
        finally:
            target.close()
        empty(image)
    finally:
        image.close()


def _require_committable(path: Path, header: Header) -> None:
    if header.backing_file is None:
        raise ConfigError(f"{shown(path)} has nothing behind it that could take what it has")
    if header.backing_format not in FORMATS:
        raise ConfigError(
            f"{shown(path)} does not say that what is behind it is one of {', '.join(FORMATS)}: "
            "see xbd image rebase --unsafe"
        )
    if header.nb_snapshots:
        raise ConfigError(
            f"{shown(path)} has snapshots, which would change with the image behind it: delete "
            "them first"
        )


def _copy(image: Image, target: _Target, progress: Progress) -> None:
    size = image.size
    progress(0, size)
    for start in range(0, size, _AT_A_TIME):
        stop = min(size, start + _AT_A_TIME)
        batch: list[Data] = []
        length = 0
        for piece in image.pieces(start, stop - start):
            if piece.kind is Kind.ZERO:
                target.zero(piece.offset, piece.length)
            elif piece.kind is not Kind.UNALLOCATED:
                for data in _read(image, piece.offset, piece.length):
                    batch.append(data)
                    length += len(data[1])
                    if length >= _BATCH:
                        target.write(batch)
                        batch, length = [], 0
        target.write(batch)
        progress(stop, size)


def _read(image: Image, offset: int, length: int) -> Iterator[Data]:
    for at in range(offset, offset + length, _LONGEST):
        buffer = image.buffer(min(_LONGEST, offset + length - at))
        image.readv(at, [buffer])
        yield at, buffer


def empty(image: Image) -> None:
    """Let the image have nothing of its own: the disk reads as what is behind it.

    It has no snapshots, and nobody else uses it.
    """
    with image.lock:
        image.require_writable()
        l1 = image.tables.l1
        image.flush()
        change = Change(
            l1=array("Q", bytes(len(l1) * 8)),
            drop=l1,
            free=table_clusters(image, image.tables.l1_offset, len(l1) * 8),
            shared=True,
        )
        make_room(image, change)
        if image.data_host is not image.host:
            image.data_host.punch(0, image.size)


# -- the lower image ---------------------------------------------------------------------------


class _Target(Protocol):
    """The image behind, open for writing.  Every method may raise `DriverError`."""

    @property
    def size(self) -> int: ...

    def grow(self, size: int) -> None:
        """What is new reads as zeroes."""

    def write(self, data: Sequence[Data]) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _open_below(image: Image) -> _Target:
    what = f"{image}: the backing file"
    path = named_path(image.header.backing_file or "", image.host.path.parent, what)
    if image.header.backing_format == "raw":
        return _RawTarget(open_confined(path, what, None, writable=True))
    return _Qcow2Target(open_image(path, Wishes(writable=True)))


class _RawTarget:
    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def size(self) -> int:
        return self._host.size()

    def grow(self, size: int) -> None:
        self._host.grow(size)

    def write(self, data: Sequence[Data]) -> None:
        transfers = [Transfer(offset, [buffer]) for offset, buffer in data]
        for error in self._host.writev(transfers):
            if error is not None:
                raise error

    def zero(self, offset: int, length: int) -> None:
        self._host.zero(offset, length, may_unmap=True)

    def flush(self) -> None:
        self._host.flush()

    def close(self) -> None:
        self._host.close()


class _Qcow2Target:
    def __init__(self, image: Image) -> None:
        self._image = image
        self._writer = Writer(image)
        self._zeroer = Zeroer(image, self._writer)

    @property
    def size(self) -> int:
        return self._image.size

    def grow(self, size: int) -> None:
        set_size(self._image, self._zeroer, size)

    def write(self, data: Sequence[Data]) -> None:
        requests = [WriteRequest(offset, [buffer]) for offset, buffer in data]
        self._writer.write(requests)
        for request in requests:
            if request.error is not None:
                raise request.error

    def zero(self, offset: int, length: int) -> None:
        self._zeroer.zero(offset, length, may_unmap=True)

    def flush(self) -> None:
        self._image.flush()

    def close(self) -> None:
        self._image.close()
