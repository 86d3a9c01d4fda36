"""Random operations on an open image, with a history of what they may have left."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
from qcow2_history import NEVER, SECTOR, ZEROES, History, Version, stamp

from xbd.core.driver import DriverError, Extent, HostExtent, WriteRequest
from xbd.core.driver.buffers import Cursor, total
from xbd.core.nbd.claims import TableClaims
from xbd.drivers.qcow2 import snapshots
from xbd.drivers.qcow2.compressing import CompressedWriter
from xbd.drivers.qcow2.host import Transfer
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.placing import Placer
from xbd.drivers.qcow2.sizing import set_size, size_problem
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

SomeClaims = Any
"""A `Claims` that has ``take(start, end)``, too."""

LENGTHS = (1, 1, 1, 2, 3, 7, 8, 9, 16, 31, 64, 100)
"""In sectors."""


@attrs.define
class Shot:
    """A snapshot that there is, or is not, from some place of the tape on."""

    there: bool
    content: bytes
    begun: int
    done: int = NEVER


class WatchedClaims(TableClaims):
    """Writes entries as the image's own are, which may be recorded, and fail."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        self._host = image.host

    def _write(self, data: bytes, position: int) -> bool:
        try:
            self._host.write(position, data)
        except DriverError:
            return False
        return True


class Player:
    """Does things to sectors [low, high) of an image; nobody else may change those."""

    def __init__(
        self,
        image: Image,
        history: History,
        chance: random.Random,
        place: Callable[[], int],
        *,
        low: int = 0,
        high: int | None = None,
        number: int = 0,
        compress: bool = False,
        claims: SomeClaims | None = None,
    ) -> None:
        """`claims`: of a data path; None: as one would make them."""
        self.image = image
        self.history = history
        self.chance = chance
        self.place = place
        self.low = low
        self.high = image.size // SECTOR if high is None else high
        self.writer = Writer(image)
        self.placer = None if compress else Placer(image)
        self.claims = claims or WatchedClaims(image)
        self.zeroer = Zeroer(image, self.writer)
        compressing = CompressedWriter(image, self.writer).write
        self._write = compressing if compress else self.writer.write
        self.number = number << 20
        self.failures = 0
        self.largest = image.size
        self.shots: dict[str, list[Shot]] = {}

    def step(self, kinds: str) -> None:
        """One operation; `kinds` are letters: Write, Zero, Unmap, Discard, Flush, Size, Read,
        All, which fills the disk, and for snapshots New, Put back, X out."""
        do = {
            "W": self.write,
            "Z": lambda: self.zero(may_unmap=False),
            "U": lambda: self.zero(may_unmap=True),
            "D": self.discard,
            "F": self.flush,
            "S": self.resize,
            "R": self.read,
            "A": self.fill,
            "N": self.take_snapshot,
            "P": self.apply_snapshot,
            "X": self.delete_snapshot,
        }[self.chance.choice(kinds)]
        try:
            do()
        except DriverError:
            self.failures += 1

    def some_range(self) -> tuple[int, int]:
        """First sector and number of sectors."""
        length = min(self.chance.choice(LENGTHS), self.high - self.low)
        if self.chance.random() < 0.3:  # stay where others were
            span = min(self.high - self.low - length, 128)
            return self.low + self.chance.randrange(span + 1), length
        return self.low + self.chance.randrange(self.high - self.low - length + 1), length

    def write(self) -> None:
        requests: list[tuple[WriteRequest, list[Version]]] = []
        taken: set[int] = set()
        for _ in range(self.chance.choice((1, 1, 2, 3, 8))):
            first, length = self.some_range()
            sectors = set(range(first, first + length))
            if taken & sectors:
                continue
            taken |= sectors
            self.number += 1
            values = [stamp(self.number, sector) for sector in range(first, first + length)]
            begun = self.history.begin(first * SECTOR, values, self.place())
            requests.append((WriteRequest(first * SECTOR, self._buffers(values)), begun))
        rest = [request for request, _ in requests]
        if self.chance.random() < 0.6:  # as the core, which may write by itself then
            self._place(rest[: self.chance.choice((0, 1, 1, len(rest)))])
            rest = [request for request in rest if not self._write_directly(request)]
        self._write(rest)
        for request, begun in requests:
            if request.error is None:
                History.end(begun, self.place())
            else:
                self.failures += 1

    def _place(self, requests: list[WriteRequest]) -> None:
        ranges = [(request.offset, total(request.buffers)) for request in requests]
        if self.placer is not None and any(self.placer.useful(*each) for each in ranges):
            extents = [Extent(offset=at, length=size) for at, size in ranges]
            try:
                self.placer.place(extents, self.claims if self.chance.random() < 0.8 else None)
            except DriverError:
                self.failures += 1

    def _write_directly(self, request: WriteRequest) -> bool:
        """Where the image says that all of it lies, or where it may be claimed."""
        length = total(request.buffers)
        with self.image.using():
            extents = self._resolve(request.offset, length)
            if extents is None and self.claims.take(request.offset, request.offset + length):
                extents = self._resolve(request.offset, length)
            if extents is None:
                return False
            cursor = Cursor(request.buffers)
            transfers = [Transfer(each.offset, cursor.take(each.length)) for each in extents]
            failures = self.image.data_host.writev(transfers)
        request.error = next((error for error in failures if error is not None), None)
        return True

    def _resolve(self, offset: int, length: int) -> list[HostExtent] | None:
        """All of a range."""
        extents = []
        while length:
            extent = self.image.resolve(offset, length, for_write=True)
            if extent is None:
                return None
            extents.append(extent)
            offset, length = offset + extent.length, length - extent.length
        return extents

    def write_one(self, first: int, data: bytes) -> None:
        """Just that, without any history."""
        request = WriteRequest(first * SECTOR, self._buffers([data]))
        self._write([request])
        if request.error is not None:
            raise request.error

    def fill(self) -> None:
        """Write all of the disk, in pieces, with a flush now and then."""
        step = (self.high - self.low) // 16
        for first in range(self.low, self.high, step):
            self.number += 1
            values = [stamp(self.number, sector) for sector in range(first, first + step)]
            begun = self.history.begin(first * SECTOR, values, self.place())
            request = WriteRequest(first * SECTOR, self._buffers(values))
            self._write([request])
            if request.error is not None:
                raise request.error
            History.end(begun, self.place())
            if self.chance.random() < 0.3:
                self.flush()

    def _buffers(self, values: list[bytes]) -> list[memoryview]:
        cut = self.chance.randrange(len(values) + 1)
        buffers = []
        for part in (values[:cut], values[cut:]):
            if part:
                buffer = self.image.buffer(len(part) * SECTOR)
                buffer[:] = b"".join(part)
                buffers.append(buffer)
        return buffers

    def zero(self, *, may_unmap: bool) -> None:
        first, length = self.some_range()
        begun = self.history.begin(first * SECTOR, [ZEROES] * length, self.place())
        self.zeroer.zero(first * SECTOR, length * SECTOR, may_unmap=may_unmap)
        History.end(begun, self.place())

    def discard(self) -> None:
        first, length = self.some_range()
        if self.chance.random() < 0.5:  # what is less than a unit does nothing
            unit = self.image.tables.subcluster_size // SECTOR
            end = min(first + length + -(first + length) % unit, self.high)
            first = max(first - first % unit, self.low)
            length = end - first
        self._discard(first, length)

    def _discard(self, first: int, length: int) -> None:
        before = [self.history.now(sector) for sector in range(first, first + length)]
        maybe = self.history.begin(first * SECTOR, [ZEROES] * length, self.place())
        self.zeroer.discard(first * SECTOR, length * SECTOR)
        after = self.image.buffer(length * SECTOR)
        self.image.readv(first * SECTOR, [after])
        for number, version in enumerate(maybe):
            value = bytes(after[number * SECTOR : (number + 1) * SECTOR])
            if not self.failures:
                assert value in (ZEROES, before[number]), f"discarding gave {value[:8].hex()}"
            if value != ZEROES:
                version = Version(value, version.begun)
                self.history.sectors[first + number].append(version)
            version.done = self.place()

    def flush(self) -> None:
        begun = self.place()
        self.image.flush()
        self.history.flushes.append((begun, self.place()))

    def resize(self) -> None:
        old = self.image.size
        if size_problem(self.image.header) is not None:
            return  # refused
        step = SECTOR * self.chance.choice((1, 3, 40, 200))
        size = max(old + self.chance.choice((-1, 1, 1)) * step, SECTOR * 8)
        size = min(size, 2 * self.largest)
        self.history.extend(max(old, size) // SECTOR)
        place = self.place()
        low, high = sorted((old, size))
        cut = self.history.begin(low, [ZEROES] * ((high - low) // SECTOR), place)
        sizes = self.history.sizes
        sizes.append(type(sizes[0])(size.to_bytes(8, "big"), place))
        try:
            set_size(self.image, self.zeroer, size)
        finally:
            self.high = self.image.size // SECTOR
        sizes[-1].done = self.place()
        History.end(cut, self.place())

    def take_snapshot(self) -> None:
        self.number += 1
        name = f"snapshot-{self.number & 0xFFFFF}"
        content = self.image.buffer(self.image.size)
        self.image.readv(0, [content])
        shot = Shot(True, bytes(content), self.place())
        self.shots[name] = [shot]
        snapshots.create(self.image, name)
        self.history.flushes.append((shot.begun, self.place()))
        shot.done = self.place()

    def delete_snapshot(self) -> None:
        name = self._some_snapshot()
        if name is None:
            return
        shot = Shot(False, b"", self.place())
        self.shots[name].append(shot)
        snapshots.delete(self.image, name)
        shot.done = self.place()

    def apply_snapshot(self) -> None:
        name = self._some_snapshot()
        if name is None:
            return
        content, place = self.shots[name][0].content, self.place()
        if self.image.header.version < 3 and len(content) != self.image.size:
            return  # refused
        values = [content[at : at + SECTOR] for at in range(0, len(content), SECTOR)]
        # What is cut off comes back as zeroes, if it does.
        values += [ZEROES] * (len(self.history.sectors) - len(values))
        begun = self.history.begin(0, values, place)
        begun.append(Version(len(content).to_bytes(8, "big"), place))
        self.history.sizes.append(begun[-1])
        try:
            snapshots.apply(self.image, name)
        finally:
            self.high = self.image.size // SECTOR
        History.end(begun, self.place())

    def _some_snapshot(self) -> str | None:
        there = [
            name
            for name, shots in self.shots.items()
            if shots[-1].there and shots[-1].done != NEVER
        ]
        return self.chance.choice(there) if there else None

    def read(self) -> None:
        """Compare some of the disk with what it must be."""
        first, length = self.some_range()
        target = self.image.buffer(length * SECTOR)
        self.image.readv(first * SECTOR, [target])
        self.compare(target, first)

    def compare(self, got: bytes | memoryview, first: int) -> None:
        """What was read from sector `first` on is what was written there last."""
        place = self.place() + 1
        for number, at in enumerate(range(0, len(got), SECTOR), first):
            value = bytes(got[at : at + SECTOR])
            versions = self.history.sectors[number]
            allowed = History.allowed(versions, place, place)
            assert value in allowed, (
                f"sector {number} reads {value[:8].hex()} instead of "
                f"{[each[:8].hex() for each in allowed]}"
            )
