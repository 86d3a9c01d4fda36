"""Putting another image behind an image.

What the disk has from the old image and would not have from the new one, the image gets itself.
All that while the old one is behind it, so a crash changes nothing of what the disk reads as; then
the header names the new one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

import attrs

from xbd.core.driver import Backing, ConfigError, HostExtent, Progress, ReadRequest, WriteRequest
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.driver.image import no_progress
from xbd.core.hostio.failures import shown
from xbd.core.units import MIB
from xbd.drivers.qcow2 import image as images
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.chain import FORMATS, RawBacking
from xbd.drivers.qcow2.confined import named_path, open_confined
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header, pack_header
from xbd.drivers.qcow2.header_update import replace_header
from xbd.drivers.qcow2.host import PAGE
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import Autoclear, ExtensionType
from xbd.drivers.qcow2.offline import opened_file, read_header
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.tables import Kind
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

_AT_A_TIME: Final = 256 * MIB
"""Of the disk: asked at once whether it is all zero; told of as progress."""

_CHUNK: Final = 2 * MIB
"""Compared at a time, of each image: whole clusters."""

_BATCH: Final = 16 * MIB
"""Of data, written together: that costs one flush."""

_MAX_FORMAT_BYTES: Final = 15
"""QEMU reads no more."""

_ZEROES: Final = bytes(_CHUNK)
_KNOWN_AUTOCLEAR: Final = sum(Autoclear)


def rebase(
    path: Path,
    backing: Backing | None,
    *,
    unsafe: bool = False,
    progress: Progress = no_progress,
) -> None:
    """See `ImageFormat.rebase`."""
    with opened_file(path, writable=unsafe) as host:
        header = read_header(host)
        _require_possible(path, header, backing)
        if unsafe:
            autoclear = header.autoclear & _KNOWN_AUTOCLEAR
            replace_header(host, _with_backing(attrs.evolve(header, autoclear=autoclear), backing))
            return
    if header.nb_snapshots:
        raise ConfigError(
            f"{shown(path)} has snapshots, which would change with what is behind it: delete them "
            "first, or say --unsafe if the new backing image has the same content"
        )
    if backing is not None and backing.format not in FORMATS:
        raise ConfigError(
            f"a backing image of the format {backing.format!r} can't be read, only of "
            f"{' or '.join(FORMATS)}"
        )
    new = _open_backing(path, backing)
    try:
        image = open_image(path, Wishes(writable=True))
        try:
            if image.backing is None:
                image.backing = _Nothing()
            _Copy(image, image.backing, new, progress).run()
            image.flush()
            with image.lock:
                header = _with_backing(image.header, backing)
                replace_header(image.host, header)
                image.header = header
        finally:
            image.close()
    finally:
        new.close()


def _require_possible(path: Path, header: Header, backing: Backing | None) -> None:
    if backing is None:
        return
    if header.raw_data_file:
        raise ConfigError(
            f"{shown(path)} has a raw data file, which has all of the disk: nothing can be behind"
        )
    encoded = backing.file.encode("utf-8", "surrogateescape")
    if not 0 < len(encoded) <= layout.MAX_BACKING_NAME_BYTES or b"\0" in encoded:
        raise ConfigError(
            "a backing image's name has between 1 and "
            f"{layout.MAX_BACKING_NAME_BYTES} bytes, and no NUL"
        )
    if not 0 < len(backing.format.encode()) <= _MAX_FORMAT_BYTES:
        raise ConfigError(f"{backing.format!r} is no format of an image")
    try:
        pack_header(_with_backing(header, backing))
    except CorruptImage as error:
        raise ConfigError(f"{shown(path)}: {error}: take a shorter name") from None


def _with_backing(header: Header, backing: Backing | None) -> Header:
    name = None if backing is None else backing.file
    kind = None if backing is None else backing.format.encode()
    header = header.with_extension(ExtensionType.BACKING_FORMAT, kind)
    return attrs.evolve(header, backing_file=name)


def _open_backing(path: Path, backing: Backing | None) -> images.Backing:
    if backing is None:
        return _Nothing()
    what = f"{shown(path)}: the new backing file"
    place = named_path(backing.file, path.parent, what)
    if backing.format == "raw":
        return RawBacking(open_confined(place, what, None))
    return open_image(place, Wishes())


class _Nothing:
    """Behind an image that has nothing behind it: zeroes."""

    size = 0

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = bytes(buffer.nbytes)

    def read(self, requests: Sequence[ReadRequest]) -> None:
        for request in requests:
            self.readv(request.offset, request.buffers)

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return [(length, True)]

    def is_zero(self, offset: int, length: int) -> bool:
        return True

    def resolve(self, offset: int, length: int) -> HostExtent | None:
        return None

    def resolve_all(self, offset: int, length: int) -> list[HostExtent]:
        return []

    def zeroes(self, offset: int, length: int) -> int:
        return length

    def in_memory(self, offset: int, length: int) -> bool:
        return True

    def load(self, offset: int, length: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Copy:
    """Gives an image what it has from `old` and would not have from `new`."""

    def __init__(
        self, image: Image, old: images.Backing, new: images.Backing, progress: Progress
    ) -> None:
        self._image = image
        self._old = old
        self._new = new
        self._progress = progress
        self._unit = image.tables.subcluster_size
        self._writer = Writer(image)
        self._zeroer = Zeroer(image, self._writer)
        self._says_zero = image.header.version >= 3
        self._batch: list[WriteRequest] = []
        self._files: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        """For the whole disk."""
        size = self._image.size
        self._progress(0, size)
        for start in range(0, size, _AT_A_TIME):
            stop = min(size, start + _AT_A_TIME)
            for piece in self._image.pieces(start, stop - start):
                if piece.kind is Kind.UNALLOCATED:
                    self._range(piece.offset, piece.offset + piece.length)
            self._write()
            self._progress(stop, size)

    def _range(self, start: int, stop: int) -> None:
        """Whole units, of which the image has nothing."""
        if self._both_are_zero(start, stop):
            return
        while start < stop:
            end = min(stop, start - start % _CHUNK + _CHUNK)
            same = self._in_the_same_place(start, end)
            if same < end:
                self._compare(same, end)
            start = end

    def _both_are_zero(self, start: int, stop: int) -> bool:
        # Both are asked, whatever the first says: `resolve` needs their tables in memory.
        told = [backing.status(start, stop - start) for backing in (self._old, self._new)]
        return all(zero for pieces in told for _, zero in pieces)

    def _in_the_same_place(self, start: int, stop: int) -> int:
        """Up to where both simply lie in the same place of the same file; at a unit's border."""
        at = start
        while at < stop:
            old = self._old.resolve(at, stop - at)
            new = self._new.resolve(at, stop - at)
            if old is None or new is None or self._place(old) != self._place(new):
                break
            at += min(old.length, new.length)
        return stop if at >= stop else max(start, at - at % self._unit)

    def _place(self, extent: HostExtent) -> tuple[int, int, int]:
        file = self._files.get(extent.fd)
        if file is None:
            status = os.fstat(extent.fd)
            file = self._files[extent.fd] = (status.st_dev, status.st_ino)
        return (*file, extent.offset)

    def _compare(self, start: int, stop: int) -> None:
        if self._both_are_zero(start, stop):
            return
        old, new = (_read(backing, start, stop) for backing in (self._old, self._new))
        at = start
        for what, units in groupby(
            range(0, stop - start, self._unit), lambda unit: self._what(old, new, unit)
        ):
            end = min(at + sum(self._unit for _ in units), stop)
            if what == "zero":
                self._zeroer.zero(at, end - at, may_unmap=True)
            elif what == "data":
                self._batch.append(WriteRequest(at, [old[at - start : end - start]]))
            at = end
        if sum(request.buffers[0].nbytes for request in self._batch) >= _BATCH:
            self._write()

    def _what(self, old: memoryview, new: memoryview, unit: int) -> str:
        """What the image needs of a unit."""
        part = old[unit : unit + self._unit]
        if part == new[unit : unit + self._unit]:
            return "nothing"
        return "zero" if self._says_zero and part == _ZEROES[: len(part)] else "data"

    def _write(self) -> None:
        batch, self._batch = self._batch, []
        self._writer.write(batch)
        for request in batch:
            if request.error is not None:
                raise request.error


def _read(backing: images.Backing, start: int, stop: int) -> memoryview:
    data = aligned_buffer(stop - start, PAGE)
    backing.readv(start, [data])
    return data
