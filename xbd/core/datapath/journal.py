"""A ring's journal: which consumed requests have no answer yet, readable after a crash.

An answer takes the place of a request in the ring before it is published, so a ring alone does
not tell what a dead backend still owed.  The journal does.  It is a file that is mapped shared,
best on tmpfs: it has to survive the process, not the host, since a host crash ends the guest too.
Nothing here waits for storage.

Layout, native byte order, one page of header and then arrays of n = `entries` elements:

======  =============  ==========================================================================
bytes   what           meaning
======  =============  ==========================================================================
0       magic          ``XBDJRNL1``
8       u32 × 4        header size, entries, request size, and an index: up to there, answers
                       that an earlier backend did not publish may lie over requests
24      u32 × 6        domid, devid, queue, ring order, event channel, number of ring refs
48      16 bytes       the ABI's protocol string, padded with NUL
64      36 bytes       a cookie: text that the backend also keeps in its XenStore directory
128     u32 × refs     ring refs
4096    u64 × n        marks: 0 free; VALID; ANSWERING | index of the response
…       u32 × n        index of the request in its ring (free-running)
…       n × request    the private copy of the request
======  =============  ==========================================================================

The rule.  A request is copied and marked VALID before any later response is written.  When it is
finished its mark becomes ANSWERING at response index k, then the response is written, then
published.  Then the mark is cleared.  After a crash, a request that is ANSWERING at k was
published if the ring's rsp_prod is past k; all others are still to do, in order of their index.

A slot is any free one, not the index modulo n: with answers out of order, request i may still be
open when request i + n arrives.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from xbd.core.units import PAGE_SIZE

MAGIC: Final = b"XBDJRNL1"
VALID: Final = 1 << 32
ANSWERING: Final = 2 << 32
_MASK: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("=8s4I6I16s36s")
_REFS_OFFSET: Final = 128


@attrs.frozen(kw_only=True)
class RingIdentity:
    """Which ring a journal belongs to; one that differs in anything is void."""

    domid: int
    devid: int
    queue: int
    ring_order: int
    event_channel: int
    ring_refs: tuple[int, ...]
    protocol: str
    cookie: str = ""


@attrs.frozen
class OpenRequest:
    """A request that was consumed, and whose answer was not published."""

    index: int
    entry: bytes


@attrs.frozen
class Debt:
    """What a dead backend leaves to the next one."""

    requests: Sequence[OpenRequest] = ()
    """In the order of their indices."""
    overlaid: int = 0
    """Slots from rsp_prod up to this index may have answers over them that were not published."""


NO_DEBT: Final = Debt()


class JournalMemory:
    """The journal of one ring, for native code to keep.

    `path` None: it is in anonymous memory, and nothing survives.  The requests of `debt`, an
    earlier backend's, take the first slots: this one answers them.  A journal that is there
    already is replaced at once, never half.
    """

    def __init__(
        self,
        identity: RingIdentity,
        entries: int,
        request_size: int,
        path: Path | None,
        debt: Debt = NO_DEBT,
    ) -> None:
        self.path = path
        self.untouched = bool(debt.requests)
        """Nobody has begun to answer an earlier backend's requests: they are left at `close`."""
        new = path and path.with_name(f"{path.name}.new")
        self._entries = entries
        self._size = request_size
        self._map = _shared_memory(new, PAGE_SIZE + (8 + 4 + request_size) * entries)
        self._write_header(identity, debt.overlaid)
        marks, indices, copies = self.arrays
        for slot, request in enumerate(debt.requests):
            marks[slot] = VALID
            indices[slot] = request.index
            copies[slot * request_size : (slot + 1) * request_size] = request.entry
        if path is not None and new is not None:
            new.replace(path)

    def _write_header(self, identity: RingIdentity, overlaid: int) -> None:
        refs = struct.pack(f"={len(identity.ring_refs)}I", *identity.ring_refs)
        self._map[_REFS_OFFSET : _REFS_OFFSET + len(refs)] = refs
        self._map[: _HEADER.size] = _HEADER.pack(
            MAGIC,
            PAGE_SIZE,
            self._entries,
            self._size,
            overlaid,
            identity.domid,
            identity.devid,
            identity.queue,
            identity.ring_order,
            identity.event_channel,
            len(identity.ring_refs),
            identity.protocol.encode(),
            identity.cookie.encode()[:36],
        )

    @property
    def arrays(self) -> tuple[memoryview, memoryview, memoryview]:
        """Marks, indices and copies, which stay where they are; no view is left at `close`."""
        marks = PAGE_SIZE
        indices = marks + 8 * self._entries
        copies = indices + 4 * self._entries
        view = memoryview(self._map)
        return view[marks:indices].cast("Q"), view[indices:copies].cast("I"), view[copies:]

    def close(self) -> None:
        """Drop the journal: the ring is drained or gone.  But leave it if it is `untouched`."""
        self._map.close()
        if not self.untouched:
            self.disown()

    def disown(self) -> None:
        """Remove the file.  The next journal of the ring has the same name, and is not ours."""
        path, self.path = self.path, None
        if path is not None:
            path.unlink(missing_ok=True)


class Journal(JournalMemory):
    """The journal of one ring, kept in Python."""

    def __init__(
        self,
        identity: RingIdentity,
        entries: int,
        request_size: int,
        path: Path | None,
        debt: Debt = NO_DEBT,
    ) -> None:
        super().__init__(identity, entries, request_size, path, debt)
        self._marks, self._indices, self._copies = self.arrays
        self._no_marks = array("Q", bytes(8 * entries))
        self._open = len(debt.requests)
        self._busy = bytearray(b"\x01" * self._open).ljust(entries, b"\x00")
        self._runs: dict[int, tuple[bytes, array[int]]] = {}

    def record(self, first: int, entries: bytes) -> Sequence[int]:
        """Copy consumed requests, the first of them at ring index `first`; their slots."""
        size = self._size
        count = len(entries) // size
        if not self._open:  # nearly always, and then there is no end to wrap around
            ones, valid = self._run(count)
            self._open = count
            self._copies[: count * size] = entries
            self._indices[:count] = array("I", _wrapping(first, count))
            self._marks[:count] = valid
            self._busy[:count] = ones
            return range(count)
        self._open += count
        return [
            self._record_one((first + i) & _MASK, entries[i * size : (i + 1) * size])
            for i in range(count)
        ]

    def _record_one(self, index: int, entry: bytes) -> int:
        slot = self._busy.find(0)
        assert slot >= 0, "more requests are open than the ring has entries"
        self._busy[slot] = 1
        self._copies[slot * self._size : (slot + 1) * self._size] = entry
        self._indices[slot] = index
        self._marks[slot] = VALID
        return slot

    def _run(self, count: int) -> tuple[bytes, array[int]]:
        """`count` busy flags and `count` VALID marks, made once per count."""
        run = self._runs.get(count)
        if run is None:
            run = self._runs[count] = (b"\x01" * count, array("Q", [VALID]) * count)
        return run

    def answering(self, slots: Sequence[int], first: int) -> None:
        """These requests are done; their responses will be written from index `first` on."""
        marks = self._marks
        if isinstance(slots, range) and first + len(slots) <= 1 << 32:
            mark = ANSWERING | first
            marks[slots.start : slots.stop] = array("Q", range(mark, mark + len(slots)))
            return
        for at, slot in enumerate(slots, first):
            marks[slot] = ANSWERING | (at & _MASK)

    def clear(self, slots: Sequence[int]) -> None:
        """The responses are published."""
        self._open -= len(slots)
        if not self._open:
            self._marks[:] = self._no_marks
            self._busy[:] = bytes(self._entries)
            return
        marks = self._marks
        busy = self._busy
        for slot in slots:
            marks[slot] = 0
            busy[slot] = 0

    @property
    def open_requests(self) -> int:
        """Requests recorded and not cleared."""
        return self._open

    def close(self) -> None:
        for view in (self._marks, self._indices, self._copies):
            view.release()
        super().close()


def read_journal(path: Path, identity: RingIdentity, rsp_prod: int) -> Debt | None:
    """What a dead backend still owed the ring.

    None: the journal belongs to another ring or is damaged, and means nothing.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < PAGE_SIZE:
        return None
    magic, header, entries, size, overlaid, *numbers, protocol, cookie = _HEADER.unpack_from(data)
    if magic != MAGIC or header != PAGE_SIZE:
        return None
    if entries > 1 << 16 or size > PAGE_SIZE or len(data) != header + entries * (12 + size):
        return None
    refs_count = min(numbers[5], (PAGE_SIZE - _REFS_OFFSET) // 4)
    found = RingIdentity(
        domid=numbers[0],
        devid=numbers[1],
        queue=numbers[2],
        ring_order=numbers[3],
        event_channel=numbers[4],
        ring_refs=struct.unpack_from(f"={refs_count}I", data, _REFS_OFFSET),
        protocol=protocol.rstrip(b"\0").decode("ascii", "replace"),
        cookie=cookie.rstrip(b"\0").decode("ascii", "replace"),
    )
    if found != identity:
        return None
    marks = struct.unpack_from(f"={entries}Q", data, header)
    indices = struct.unpack_from(f"={entries}I", data, header + 8 * entries)
    copies = header + 12 * entries
    slots = [slot for slot, mark in enumerate(marks) if mark and not _published(mark, rsp_prod)]
    written = [overlaid, *((marks[slot] + 1) & _MASK for slot in slots if marks[slot] >= ANSWERING)]
    ahead = max(
        (far for index in written if 0 < (far := distance(rsp_prod, index)) <= entries), default=0
    )
    requests = [
        OpenRequest(indices[slot], data[copies + slot * size : copies + (slot + 1) * size])
        for slot in slots
    ]
    return Debt(
        sorted(requests, key=lambda request: distance(rsp_prod, request.index)),
        (rsp_prod + ahead) & _MASK,
    )


def distance(start: int, end: int) -> int:
    """How far one free-running index is from another, from -2**31 to 2**31 - 1."""
    return ((end - start + (1 << 31)) & _MASK) - (1 << 31)


def _published(mark: int, rsp_prod: int) -> bool:
    if mark < ANSWERING:
        return False
    return distance(mark & _MASK, rsp_prod) > 0


def _wrapping(first: int, count: int) -> range | list[int]:
    if first + count <= 1 << 32:
        return range(first, first + count)
    return [(first + i) & _MASK for i in range(count)]


def _shared_memory(path: Path | None, size: int) -> mmap.mmap:
    if path is None:
        return mmap.mmap(-1, size)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)
