"""What a driver does to its host files, recorded; and what a crash may leave of it.

A crash state is built by the rules of POSIX and nothing more: what was written before a flush began
that has ended is there; of everything later each sector of 512 bytes may have reached the disk or
not, whatever came before or after it; so may each change of the file's size.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import attrs

from xbd.core.driver import DriverError, NoSpace
from xbd.core.hostio.failures import io_failure, shown
from xbd.core.hostio.parallel import Piece
from xbd.drivers.qcow2.host import PAGE, Host, Transfer

SECTOR = 512


@attrs.frozen
class Change:
    """Bytes that were written to a file, or zeroed (`data` None)."""

    file: str
    offset: int
    length: int
    data: bytes | None = None
    guest: bool = False
    """It was guest data, not metadata."""
    durable: bool = False
    """It was durable when it ended, and the file's size with it: Linux syncs the inode."""


@attrs.frozen
class Size:
    """The file was made so long."""

    file: str
    size: int


@attrs.frozen
class Flushed:
    """A flush has ended that had begun at place `since` of the tape."""

    file: str
    since: int


Event = Change | Size | Flushed


class Tape:
    """Events in the order in which they ended."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.start: dict[str, bytes] = {}
        """The files before it all."""
        self.lock = threading.Lock()

    def now(self) -> int:
        return len(self.events)

    def add(self, event: Event) -> None:
        self.events.append(event)


Fault = Callable[[str], DriverError | None]
"""Told of each call before it is made (``write``, ``writev``, ``zero``, ``punch``, ``truncate``,
``flush``, ``read``, ``readv``); what it answers is raised."""


class RecordingHost(Host):
    """A host file whose changes go on a tape, and whose calls may fail."""

    @classmethod
    def over(cls, host: Host, tape: Tape, name: str) -> RecordingHost:
        """Instead of `host`, which may not be used any more."""
        self = cls(host.path, host.fd, host._cached_fd, host.alignment, writable=host.writable)
        self.tape = tape
        self.name = name
        self.fault: Fault = lambda what: None
        self.chance = random.Random(0)
        self.calls: Counter[str] = Counter()
        tape.start[name] = host.path.read_bytes()
        return self

    @property
    def direct(self) -> bool:
        """Whatever the file: what is done in that case is to be recorded, too."""
        return True

    def _may_fail(self, what: str) -> None:
        self.calls[what] += 1
        error = self.fault(what)
        if error is not None:
            raise error

    def _part(self, what: str, offset: int, length: int) -> tuple[int, DriverError | None]:
        """How much of a write is done, and how it fails then: where a page begins."""
        self.calls[what] += 1
        error = self.fault(what)
        if error is None:
            return length, None
        pages = range(offset + -offset % PAGE, offset + length, PAGE)
        return self.chance.choice((offset, *pages)) - offset, error

    def read(self, offset: int, length: int) -> bytearray:
        self._may_fail("read")
        return super().read(offset, length)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._may_fail("readv")
        super().readv(offset, buffers)

    def read_transfers(
        self, transfers: Sequence[Transfer], *, cached: bool = False
    ) -> list[DriverError | None]:
        failures: list[DriverError | None] = []
        for transfer in transfers:
            try:
                self.readv(transfer.offset, transfer.buffers)
                failures.append(None)
            except DriverError as error:
                failures.append(error)
        return failures

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with self.tape.lock:
            done, error = self._part("write", offset, len(data))
            if done:
                data = bytes(data)[:done]
                super().write(offset, data)
                self.tape.add(Change(self.name, offset, done, data))
        if error is not None:
            raise error

    def write_durably(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with self.tape.lock:
            done, error = self._part("write", offset, len(data))
            if done:
                data = bytes(data)[:done]
                super().write(offset, data)
                self.tape.add(Change(self.name, offset, done, data, durable=error is None))
        if error is not None:
            raise error

    def writev(self, transfers: Sequence[Transfer]) -> list[DriverError | None]:
        failures = []
        for transfer in transfers:
            data = b"".join(transfer.buffers)
            with self.tape.lock:
                done, failure = self._part("writev", transfer.offset, len(data))
                if done:
                    part = Transfer(transfer.offset, [memoryview(bytearray(data[:done]))])
                    (failed,) = super().writev([part])
                    assert failed is None
                    change = Change(self.name, transfer.offset, done, data[:done], guest=True)
                    self.tape.add(change)
            failures.append(failure)
        return failures

    def copy(self, copies: Sequence[tuple[Piece, Transfer]]) -> list[bool]:
        done = []
        for (fd, offset, buffers), new in copies:
            self.calls["readv"] += 1
            refused = self.fault("readv") is not None
            if refused or os.preadv(fd, buffers, offset) < sum(map(len, buffers)):
                done.append(False)
            else:
                done.append(self.writev([new]) == [None])
        return done

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        with self.tape.lock:
            self._may_fail("zero")
            super().zero(offset, length, may_unmap=may_unmap)
            self.tape.add(Change(self.name, offset, length))

    def punch(self, offset: int, length: int) -> None:
        with self.tape.lock:
            self._may_fail("punch")
            super().punch(offset, length)
            self.tape.add(Change(self.name, offset, length))

    def truncate(self, size: int) -> None:
        with self.tape.lock:
            self._may_fail("truncate")
            super().truncate(size)
            self.tape.add(Size(self.name, size))

    def flush(self) -> None:
        since = self.tape.now()
        if not self._lost and self.fault("flush") is not None:
            # As the kernel: what failed to be written once is forgotten.
            self._lost = errno.EIO
            raise io_failure(f"flush {shown(self.path)}", errno.EIO)
        super().flush()
        self.calls["flush"] += 1
        with self.tape.lock:
            self.tape.add(Flushed(self.name, since))


def failing_at(calls: set[int], chance: random.Random, *, spare: frozenset[str]) -> Fault:
    """The calls with these numbers fail, but for the kinds to `spare`."""
    number = 0

    def fault(what: str) -> DriverError | None:
        nonlocal number
        if what in spare:
            return None
        number += 1
        if number not in calls:
            return None
        text = f"{what} failed for the test's sake"
        if what in ("write", "writev", "zero", "truncate") and chance.random() < 0.5:
            return NoSpace(text)
        return DriverError(text, errno=errno.EIO)

    return fault


def some_fail(chance: random.Random) -> Fault:
    """Some single calls fail, or all for a while; flushes, of which one is enough, seldom do."""
    first = chance.randrange(250)
    calls = {chance.randrange(250) for _ in range(chance.choice((1, 3, 10)))}
    calls.update(range(first, first + chance.choice((0, 0, 3, 20))))
    spare = chance.choice((frozenset(), frozenset({"flush"}), frozenset({"flush", "read"})))
    return failing_at(calls, chance, spare=spare)


@attrs.define
class Crashes:
    """Walks along a tape, and tells what its files may be after a crash."""

    tape: Tape
    _base: dict[str, bytearray] = attrs.field(init=False)
    """What is durable for sure."""
    _based: dict[str, int] = attrs.field(init=False)
    """Up to which event of the tape."""
    _seen: int = 0
    _flushed: dict[str, int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._base = {name: bytearray(data) for name, data in self.tape.start.items()}
        self._based = dict.fromkeys(self._base, 0)
        self._flushed = dict.fromkeys(self._base, 0)

    def go_to(self, when: int) -> None:
        """The crash comes after so many events; only forwards."""
        for event in self.tape.events[self._seen : when]:
            if isinstance(event, Flushed):
                self._flushed[event.file] = max(self._flushed[event.file], event.since)
        self._seen = when
        for name, base in self._base.items():
            for event in self.tape.events[self._based[name] : self._flushed[name]]:
                if event.file == name:
                    apply(base, event)
            self._based[name] = self._flushed[name]

    def pending(self) -> list[Change | Size]:
        """What may have reached the disk or not."""
        first = min(self._flushed.values())
        return [
            event
            for place, event in enumerate(self.tape.events[first : self._seen], first)
            if not isinstance(event, Flushed) and place >= self._flushed[event.file]
        ]

    def process_died(self) -> dict[str, bytearray]:
        """Everything is there: the kernel lives."""
        return self._with(self.pending())

    def power_failed(self, chance: random.Random) -> dict[str, bytearray]:
        """One state of many: what is chosen, and how torn, is chance."""
        pending = self.pending()
        share = chance.choice((0.05, 0.3, 0.5, 0.7, 0.95, 1.0))
        kind = chance.randrange(8)
        chosen = chance.choice(pending) if pending else None
        first = chance.randrange(len(pending) + 1)
        synced = {
            event.file: place
            for place, event in enumerate(pending)
            if isinstance(event, Change) and event.durable
        }
        kept: list[Change | Size] = []
        for place, event in enumerate(pending):
            guest = isinstance(event, Change) and event.guest
            sized = isinstance(event, Size) and place < synced.get(event.file, 0)
            if sized or (isinstance(event, Change) and event.durable):
                kept.append(event)
            elif kind >= 5:
                kept += [part for part in _torn(event, chance) if chance.random() < share]
            elif (
                (kind == 0 and chance.random() < share)
                or (kind == 1 and event is chosen)
                or (kind == 2 and event is not chosen)
                or (kind == 3 and not guest)
                or (kind == 4 and place >= first)
            ):
                kept.append(event)
        return self._with(kept)

    def _with(self, events: Sequence[Change | Size]) -> dict[str, bytearray]:
        files = {name: bytearray(base) for name, base in self._base.items()}
        for event in events:
            apply(files[event.file], event)
        return files


def apply(content: bytearray, event: Event) -> None:
    """Carry out a change on a file's content."""
    if isinstance(event, Size):
        if event.size < len(content):
            del content[event.size :]
        else:
            content.extend(bytes(event.size - len(content)))
    elif isinstance(event, Change):
        end = event.offset + event.length
        if event.data is None:
            end = min(end, len(content))  # neither holes nor zeroes make a file longer
            if event.offset < end:
                content[event.offset : end] = bytes(end - event.offset)
            return
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        content[event.offset : end] = event.data


def _torn(event: Change | Size, chance: random.Random) -> Iterator[Change | Size]:
    """A change in sectors; zeroes, which can be long, in a few parts."""
    if isinstance(event, Size) or event.offset % SECTOR + event.length <= SECTOR:
        yield event
        return
    end = event.offset + event.length
    at = event.offset
    while at < end:
        step = SECTOR
        if event.data is None:
            step *= chance.choice((1, 1, 8, 64, 1024))
        stop = min(end, at - at % SECTOR + step)
        data = event.data and event.data[at - event.offset : stop - event.offset]
        yield Change(event.file, at, stop - at, data, event.guest)
        at = stop
