"""Resizing an image that nobody has open; see `sizing` for the change itself."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from xbd.core.driver import ConfigError, DriverError, Progress
from xbd.core.driver.image import no_progress
from xbd.core.hostio.failures import shown
from xbd.core.hostio.newfile import fill, reserve
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.create_options import FALLOC, FULL, METADATA, OFF
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import ALL_ZERO, COPIED, ZERO
from xbd.drivers.qcow2.offline import opened_file, read_header
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.refcounts import runs
from xbd.drivers.qcow2.secrets import read_secret
from xbd.drivers.qcow2.sizing import set_size, size_problem
from xbd.drivers.qcow2.writing import Writer, writable_l2
from xbd.drivers.qcow2.zeroing import Zeroer

_PREALLOCATIONS: Final = (OFF, METADATA, FALLOC, FULL)


def resize(
    path: Path,
    size: int,
    *,
    shrink: bool = False,
    preallocation: str = OFF,
    key_file: Path | None = None,
    progress: Progress = no_progress,
) -> None:
    """See `ImageFormat.resize`."""
    size += -size % layout.SECTOR
    if preallocation not in _PREALLOCATIONS:
        raise ConfigError(
            f"preallocation: {preallocation!r} is none of {', '.join(_PREALLOCATIONS)}"
        )
    # Before it is opened for writing, which may change things in it.
    with opened_file(path, writable=False) as host:
        header = read_header(host)
    _check(path, header, size, shrink=shrink, preallocation=preallocation)
    image = open_image(path, Wishes(writable=True, key=read_secret(key_file, None)))
    try:
        _resize(image, size, preallocation, progress)
    finally:
        image.close()


def _check(path: Path, header: Header, size: int, *, shrink: bool, preallocation: str) -> None:
    name = shown(path)
    if size < header.size and not shrink:
        raise ConfigError(
            f"{name} is a disk of {header.size} bytes: to lose what lies behind {size}, say "
            "--shrink"
        )
    if size < header.size and preallocation != OFF:
        raise ConfigError("preallocation is for disks that grow")
    problem = size_problem(header)
    if problem is not None:
        raise ConfigError(f"{name} {problem}")
    if header.version == 2 and preallocation != OFF and header.crypt_method:
        raise ConfigError("preallocation of an encrypted image needs compat=1.1")


def _resize(image: Image, size: int, preallocation: str, progress: Progress) -> None:
    old = image.size
    zeroer = Zeroer(image, Writer(image))
    external = image.data_host is not image.host
    if external and size > old:
        image.data_host.grow(size)
    set_size(image, zeroer, size)
    if image.header.raw_data_file and preallocation == OFF:
        # What is not mapped reads as zeroes, whatever the data file says of it.
        preallocation = METADATA
    if size > old and preallocation != OFF:
        try:
            _Preallocation(image, preallocation, progress).run(old, size)
        except DriverError:
            set_size(image, zeroer, old)
            raise
    image.flush()
    if external and size < old:
        _cut(image.data_host, size)


def _cut(data: Host, size: int) -> None:
    if stat.S_ISREG(os.fstat(data.fd).st_mode):
        data.truncate(size)
        data.flush()


class _Preallocation:
    """Gives every cluster of a range that has no place in the data file one."""

    def __init__(self, image: Image, preallocation: str, progress: Progress) -> None:
        self._image = image
        self._tables = image.tables
        self._bits = image.header.cluster_bits
        self._external = image.data_host is not image.host
        means: dict[str, Callable[..., None]] = {FALLOC: reserve, FULL: fill}
        self._allocate = means.get(preallocation)
        self._progress = progress
        self._done = 0
        self._total = 0

    def run(self, old: int, size: int) -> None:
        """For the disk's whole clusters from `old` on; the last may be cut short by its end."""
        first, last = -(-old >> self._bits), -(-size >> self._bits)
        self._total = last - first
        entries = self._tables.l2_entries
        for index in range(first // entries, -(-last // entries)):
            start, stop = max(first, index * entries), min(last, (index + 1) * entries)
            with self._image.lock:
                self._table(index, start, stop)
            self._done += stop - start
            self._progress(self._done, self._total)

    def _table(self, index: int, start: int, stop: int) -> None:
        tables = self._tables
        table = writable_l2(self._image, index)
        words = 2 if tables.extended else 1
        first = index * tables.l2_entries
        places = [
            place
            for place in range(start - first, stop - first)
            if not tables.has_host(table[words * place])
        ]
        # Zeroes in the file are no zeroes once they are decrypted.
        flags = COPIED | (ZERO if self._image.cipher is not None and not tables.extended else 0)
        changes = {}
        for place, host in zip(places, self._clusters(first, places), strict=True):
            changes[words * place] = host | flags
            if tables.extended:
                changes[2 * place + 1] = ALL_ZERO
        tables.change(index, changes)

    def _clusters(self, first: int, places: list[int]) -> Iterator[int]:
        """Host offsets for these clusters; what lies there are zeroes."""
        hosts = [first + place for place in places] if self._external else []
        while len(hosts) < len(places):
            hosts += self._image.refcounts.reserve(len(places) - len(hosts))
        if self._allocate is None and not self._external:
            # What is reserved is about to be written, as a rule; not so here.
            for host, count in runs(hosts):
                self._image.host.punch(host << self._bits, count << self._bits)
        if self._allocate is not None and hosts:
            data = self._image.data_host
            # The disk's end may cut the last cluster short.
            end = self._image.size if self._external else hosts[-1] + 1 << self._bits
            for host, count in runs(hosts):
                offset = host << self._bits
                length = min(count << self._bits, end - offset)
                self._allocate(data.path, data.fd, offset, length, lambda _: None)
            data.flush()
        yield from (host << self._bits for host in hosts)
