"""What a hostile image goes through: everything that xbd does with images, again and again.

Nothing but `DriverError` and `ConfigError` may come out.  An image that the check calls clean,
or that was mended, must behave: it reads as it was written, and stays clean.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs
from qcow2_images import KEY, Seed

from xbd.core.driver import CheckReport, ConfigError, DriverError, WriteRequest
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import snapshots
from xbd.drivers.qcow2.bitmaps import load_bitmaps
from xbd.drivers.qcow2.check import check_image
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header, parse_header
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.info import read_info
from xbd.drivers.qcow2.layout import COPIED
from xbd.drivers.qcow2.map import map_image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.sizing import set_size
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

MOST_READ: Final = 8 * MIB
"""Of a disk that may claim to have exabytes."""

MOST_GROWTH: Final = 256 * MIB
"""Of a host file, by some hundred KiB of writes and metadata in clusters of up to 2 MiB."""

PATIENCE: Final = 5
"""Other processes want the machine, too."""

MOST_ENTRIES: Final = 20_000
"""Of a map."""


class Find(AssertionError):
    """An image made xbd misbehave."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Find` after so much work, or after waiting for a multiple of it."""

    def ring(*_: object) -> None:
        raise Find(f"it took more than {seconds} s")

    before = [signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


@contextmanager
def allowed() -> Iterator[None]:
    """Errors that may be told to somebody, in one line that a terminal survives."""
    try:
        yield
    except (DriverError, ConfigError) as error:
        if not str(error).isprintable():
            raise Find(f"a text that nobody can print: {str(error)!a}") from error


def clean(found: CheckReport | None) -> bool:
    return found is not None and not (found.corruptions or found.leaks or found.errors)


@attrs.define
class Ordeal:
    """Of one image, which is only read; what changes happens to copies beside it."""

    image: Path
    seed: Seed
    dice: random.Random
    scratch: Path
    steps: list[str] = attrs.field(factory=list)
    """What was done, and is being done."""

    def run(self) -> None:
        """Raises whatever is a find."""
        bytes_before = self.image.read_bytes()
        report = self._check(self.image)
        with allowed():
            self.steps.append("info")
            read_info(self.image)
        with allowed():
            self.steps.append("map")
            for number, _ in enumerate(map_image(self.image, image_dirs=self._image_dirs)):
                if number > MOST_ENTRIES:
                    break
        with allowed():
            self.steps.append("read")
            self._read_all(self.image)
        if self.image.read_bytes() != bytes_before:
            raise Find("reading changed the image")
        self._use(self._copy("used"), report)
        mended = self._copy("mended")
        if self._mend(mended) and not self._is_lost(mended):
            self._use(mended, self._check(mended))

    @property
    def _image_dirs(self) -> Sequence[Path]:
        return [self.seed.path.parent, self.scratch]

    def _copy(self, name: str) -> Path:
        target = self.scratch / name
        shutil.copyfile(self.image, target)
        return target

    def _check(self, path: Path) -> CheckReport | None:
        self.steps.append(f"check {path.name}")
        with allowed():
            return check_image(path)
        return None

    def _mend(self, path: Path) -> bool:
        before = path.stat().st_size
        for repair in ("leaks", "all"):
            self.steps.append(f"mend {repair}")
            with allowed():
                after = check_image(path, repair=repair)
                if clean(after) and not clean(self._check(path)):
                    raise Find("it was mended, and it is not clean")
        self._require_modest(path, before)
        return clean(self._check(path))

    @staticmethod
    def _require_modest(path: Path, before: int) -> None:
        # An entry may name a cluster far behind the end, and a write there makes a hole: it is
        # room that counts.
        room = path.stat().st_blocks * 512
        if room > before + MOST_GROWTH:
            raise Find(f"the file occupies {room} bytes instead of {before}")

    def _is_lost(self, path: Path) -> bool:
        """Nothing can be expected of an image that can't even be opened."""
        try:
            with self._opened(path, writable=False):
                return False
        except (DriverError, ConfigError):
            return True

    # -- the disk -----------------------------------------------------------------------------

    @contextmanager
    def _opened(self, path: Path, *, writable: bool) -> Iterator[Image]:
        image = open_image(path, self._wishes(path, writable=writable))
        try:
            yield image
        finally:
            image.close()

    def _wishes(self, path: Path, *, writable: bool) -> Wishes:
        data_file = None
        with suppress(DriverError):
            header: Header = parse_header(path.read_bytes()[: 2 * MIB])
            named = self.seed.path.parent / Path(header.data_file or "").name
            if header.has_data_file and named.is_file():
                data_file = self.scratch / f"{path.name}-data"
                if not data_file.exists():
                    shutil.copyfile(named, data_file)
        return Wishes(
            writable=writable,
            direct=self.dice.random() < 0.2,
            image_dirs=self._image_dirs,
            data_file=data_file,
            key=KEY if self.seed.encrypted else None,
            cache_bytes=self.dice.choice((4 * KIB, MIB)),
        )

    @staticmethod
    def _places(size: int, unit: int) -> list[tuple[int, int]]:
        """What is read of a disk: its beginning, its end, and something in between."""
        if size <= MOST_READ:
            return [(0, size)]
        places = [(0, MOST_READ // 2), (size - unit, unit)]
        middle = size // 2 - size // 2 % unit
        return [*places, (middle, unit)]

    def _read(self, image: Image, offset: int, length: int) -> bytes:
        data = image.buffer(length)  # as direct I/O wants it
        image.readv(offset, [data])
        return bytes(data)

    def _read_all(self, path: Path) -> None:
        """A piece that fails says nothing of the next."""
        with self._opened(path, writable=False) as image:
            unit = min(MIB, image.header.cluster_size)
            for start, length in self._places(image.size, unit):
                for offset in range(start, start + length, unit):
                    with allowed():
                        self._read(image, offset, min(unit, start + length - offset))
                with allowed():
                    image.block_status(start, length)
                with allowed():
                    image.resolve(start, length)

    def _use(self, path: Path, report: CheckReport | None) -> None:
        """Change the disk.  If the image is clean, the disk must be what was written."""
        before = path.stat().st_size
        trusted = clean(report)
        self.steps.append(f"use {path.name}, {'clean' if trusted else 'not clean'}")
        with allowed(), self._opened(path, writable=True) as image:
            self._change(image, trusted=trusted and report is not None)
        self._require_modest(path, before)
        if not trusted:
            return
        after = self._check(path)
        if after is None or not (clean(after) or self._is_harmless(after, path, before)):
            messages = () if after is None else after.messages[:3]
            raise Find(f"it was clean, and is not any more: {messages}")

    @staticmethod
    def _is_harmless(found: CheckReport, path: Path, size: int) -> bool:
        """What a check can't know before the image is used, and what harms nobody.

        Wrong refcounts behind the file's end become leaks when the file grows.  When one of two
        entries that name the same cluster (which is no corruption, but nobody does it) gets a
        cluster of its own, the other's COPIED flag is missing.
        """
        cluster_size = parse_header(path.read_bytes()[: 2 * MIB]).cluster_size
        for text in found.messages:
            leak = re.fullmatch(r"cluster (\d+) has refcount \d+ and is used 0 times", text)
            flag = re.fullmatch(r"L2 entry (0x[0-9a-f]+) has a wrong COPIED flag", text)
            beyond = leak is not None and int(leak[1]) * cluster_size >= size
            missing = flag is not None and not int(flag[1], 16) & COPIED
            if not (beyond or missing):
                return False
        return True

    def _change(self, image: Image, *, trusted: bool) -> None:
        model: bytearray | None = None
        # A part of an encrypted sector means nothing; no disk but a damaged one has such an end.
        if trusted and 0 < image.size <= MOST_READ and image.size % 512 == 0:
            # What can't be read (bad compressed data) says nothing about what is written.
            with suppress(DriverError):
                model = bytearray(self._read(image, 0, image.size))
        for _ in range(self.dice.randrange(4, 16)):
            self._change_once(image, model)
        self._compare(image, model)
        self.steps.append("flush")
        with allowed():
            image.flush()
        if not image.header.has_data_file:
            with allowed():
                load_bitmaps(image.host, image.header)

    def _change_once(self, image: Image, model: bytearray | None) -> None:
        size = image.size
        if not size:
            return
        dice = self.dice
        limit = min(size, dice.choice((size, MOST_READ, 256 * KIB)))
        offset = dice.randrange(max(1, limit // 512)) * 512
        length = min(size - offset, dice.choice((512, 4096, 64 * KIB, 200 * KIB)))
        what = dice.choice(
            ("write", "write", "write", "zero", "discard", "flush", "snapshot", "size")
        )
        self.steps.append(f"{what} {offset:#x} {length:#x}")
        try:
            if what == "write":
                data = bytes([dice.randrange(256)]) * length
                buffer = image.buffer(length)
                buffer[:] = data
                request = WriteRequest(offset, [buffer])
                Writer(image).write([request])
                if request.error is not None:
                    raise request.error
                _set(model, offset, data)
            elif what == "zero":
                self._zeroer(image).zero(offset, length, may_unmap=dice.random() < 0.5)
                _set(model, offset, bytes(length))
            elif what == "discard":
                self._zeroer(image).discard(offset, length)
                if model is not None:
                    model[offset : offset + length] = self._read(image, offset, length)
            elif what == "flush":
                image.flush()
            elif what == "snapshot":
                self._snapshot(image, model)
            else:
                grown = image.size + dice.choice((512, 64 * KIB, MIB))
                set_size(image, self._zeroer(image), grown)
                if model is not None:
                    # Tables may name clusters behind the end of a disk whose size was damaged.
                    model += self._read(image, len(model), grown - len(model))
        except CorruptImage as error:
            if model is not None:
                raise Find(f"a clean image is corrupt after all: {error}") from error
            with allowed():
                raise
        except (DriverError, ConfigError):
            with allowed():
                raise

    @staticmethod
    def _zeroer(image: Image) -> Zeroer:
        return Zeroer(image, Writer(image))

    def _snapshot(self, image: Image, model: bytearray | None) -> None:
        if not snapshots.possible(image):
            return
        there = snapshots.list_(image)
        if len(there) > 3 or (there and self.dice.random() < 0.3):
            snapshots.delete(image, self.dice.choice(there).id)
        elif there and model is None and self.dice.random() < 0.3:
            snapshots.apply(image, self.dice.choice(there).id)
        else:
            snapshots.create(image, f"fuzz {len(there)}")

    def _compare(self, image: Image, model: bytearray | None) -> None:
        if model is None:
            return
        self.steps.append("compare")
        if image.size != len(model):
            raise Find(f"the disk has {image.size} bytes instead of {len(model)}")
        there = self._read(image, 0, image.size)
        if there != model:
            at = next(at for at in range(len(model)) if there[at] != model[at])
            raise Find(f"byte {at:#x} is {there[at]:#x} instead of {model[at]:#x}")


def _set(model: bytearray | None, offset: int, data: bytes) -> None:
    if model is not None:
        model[offset : offset + len(data)] = data


@contextmanager
def no_power_cuts() -> Iterator[None]:
    """Nothing waits for the host's disk."""
    real = os.fdatasync
    os.fdatasync = lambda fd: None
    try:
        yield
    finally:
        os.fdatasync = real
