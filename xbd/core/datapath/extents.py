"""What drivers answered to `resolve`, kept until they take it back.

Most of it is kept by chunks, in eight bytes each (`ChunkMap`).  What does not come in whole chunks,
and extents so long that one need not look further, are in a short table.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from xbd.core.datapath.chunk_map import KNOWN, PAGE_CHUNKS, PAGE_SHIFT, ChunkMap
from xbd.core.driver import HostExtent

CHUNK_SHIFT = 16
"""Chunks have 64 KiB: qcow2's usual cluster."""
FINE_CHUNK_SHIFT = 12
"""And 4 KiB on a disk that has too many extents smaller than that."""
MAX_FILES = 8
"""Host files that have maps; the extents of others are in the table."""
MAX_PAGES = 4096
"""Memory of the maps, for reading and again for writing: 16 MiB.  That is enough for 128 GiB in
scattered chunks."""
MAX_EXTENTS = 4096
"""Extents in a table; beyond that a part is dropped."""

Entry = tuple[int, int, int, int]
"""Start and end on the guest's disk, the host file's fd, and what to add for the host's offset."""
Piece = tuple[int, int, int]
"""A host file's fd, where in it, and how many bytes."""

FAR = 1 << 63
"""Behind any byte of any disk."""

NOTHING: Entry = (FAR, FAR, -1, 0)
"""An entry that holds no byte."""


class Resolver(Protocol):
    """`DeviceAccess.resolve`."""

    def __call__(
        self, offset: int, length: int, *, for_write: bool
    ) -> Sequence[HostExtent] | None: ...


class ExtentCache:
    """What is known of a disk: once for reading, once for writing."""

    def __init__(self, resolve: Resolver) -> None:
        self.reading = KnownExtents(partial(resolve, for_write=False))
        self.writing = KnownExtents(partial(resolve, for_write=True))

    def forget(self, offset: int, length: int) -> bool:
        """Drop what is known of a range.  Whether I/O through it may be in flight: always, since
        rings may have found it before and have it in their hands."""
        self.reading.forget(offset, length)
        self.writing.forget(offset, length)
        return True


class KnownExtents:
    """What is known for one direction."""

    def __init__(self, resolve: Callable[[int, int], Sequence[HostExtent] | None]) -> None:
        self._resolve = resolve
        self._start_again(CHUNK_SHIFT)

    def _start_again(self, shift: int) -> None:
        self._shift = shift
        self._whole = True
        """Whether all extents so far ended where a chunk ends: what the driver says of a chunk's
        beginning is then true of the chunk."""
        self._table: list[Entry] = []
        self._maps: list[ChunkMap] = []
        self.hot = NOTHING
        """The entry of the table that was found last: a ring's short cut within one wake-up."""
        self.hot_map = ChunkMap(-1, shift)
        """The map in which a chunk was found last: another one."""

    # -- looking up -------------------------------------------------------------------------

    def find(self, offset: int, length: int) -> list[Piece] | None:
        """Where the range lies, in order.  None: ask the driver's async methods."""
        pieces: list[Piece] = []
        stop = offset + length
        while offset < stop:
            piece = self.known(offset, stop) or self._ask(offset, stop)
            if piece is None:
                return None
            fd, position, size = piece
            offset += size
            if pieces:
                last_fd, last_position, last_size = pieces[-1]
                if last_fd == fd and last_position + last_size == position:
                    pieces[-1] = (fd, last_position, last_size + size)
                    continue
            pieces.append(piece)
        return pieces

    def known(self, offset: int, stop: int) -> Piece | None:
        """Where the range's beginning lies, as far as the driver need not be asked."""
        shift = self._shift
        chunk = offset >> shift
        chunks = self.hot_map
        word = chunks.word(chunk)
        if not word:
            for chunks in self._maps:
                if word := chunks.word(chunk):
                    self.hot_map = chunks
                    break
            else:
                return self._in_table(offset, stop)
        last = chunk + 1
        while last << shift < stop and chunks.word(last) == word:
            last += 1
        return chunks.fd, offset + word - KNOWN, min(last << shift, stop) - offset

    def _in_table(self, offset: int, stop: int) -> Piece | None:
        at = _last_before(self._table, offset)
        if at < 0 or offset >= self._table[at][1]:
            return None
        self.hot = start, end, fd, delta = self._table[at]
        # Next time it will be found in the map.
        page = offset >> self._shift + PAGE_SHIFT << PAGE_SHIFT
        first, last = -(-start >> self._shift), end >> self._shift
        self._fill(max(first, page), min(last, page + PAGE_CHUNKS), fd, delta)
        return fd, offset + delta, min(end, stop) - offset

    # -- learning ---------------------------------------------------------------------------

    def _ask(self, offset: int, stop: int) -> Piece | None:
        """Learn where the range's beginning lies."""
        start = offset >> self._shift << self._shift  # a part of a chunk can't be in a map
        self._learn(start, stop)
        piece = self.known(offset, stop)
        if piece is None and start < offset and not self._whole:
            self._learn(offset, stop)
            piece = self.known(offset, stop)
        return piece

    def _learn(self, start: int, stop: int) -> None:
        for extent in self._resolve(start, stop - start) or ():
            end = start + extent.length
            self._keep(start, end, extent.fd, extent.offset - start)
            start = end

    def _keep(self, start: int, end: int, fd: int, delta: int) -> None:
        shift = self._shift
        first, last = -(-start >> shift), end >> shift
        if last << shift < end:
            self._whole = False
        if last - first > PAGE_CHUNKS or not self._fill(first, last, fd, delta):
            self._insert(start, end, fd, delta)
            return
        if start < first << shift:
            self._insert(start, first << shift, fd, delta)
        if last << shift < end:
            self._insert(last << shift, end, fd, delta)

    def _fill(self, first: int, last: int, fd: int, delta: int) -> bool:
        """Note it for whole chunks in a map; False if there are none, or no room for them."""
        if first >= last:
            return False
        for chunks in self._maps:
            if chunks.fd == fd:
                break
        else:
            if len(self._maps) >= MAX_FILES:
                return False
            chunks = ChunkMap(fd, self._shift)
            self._maps.append(chunks)
        pages = chunks.pages
        done = chunks.fill(first, last, delta)
        if chunks.pages > pages and sum(each.pages for each in self._maps) > MAX_PAGES:
            max(self._maps, key=lambda each: each.pages).drop()
        return done

    def _insert(self, start: int, end: int, fd: int, delta: int) -> None:
        """Note the range in the table, as one with neighbours that it continues."""
        table = self._table
        _cut(table, start, end)
        at = _last_before(table, start) + 1
        if at < len(table) and table[at][0] == end and table[at][2:] == (fd, delta):
            end = table.pop(at)[1]
        if at and table[at - 1][1] == start and table[at - 1][2:] == (fd, delta):
            start = table.pop(at - 1)[0]
        if len(table) >= MAX_EXTENTS:
            self._make_room(start)
        insort(self._table, (start, end, fd, delta))

    def _make_room(self, start: int) -> None:
        """Drop the half of the table that is not near `start`; or all, for finer chunks."""
        table = self._table
        chunk = 1 << self._shift
        small = sum(end - start < chunk for start, end, _, _ in table)
        if chunk > 1 << FINE_CHUNK_SHIFT and small > MAX_EXTENTS // 2:
            self._start_again(FINE_CHUNK_SHIFT)
        elif _last_before(table, start) < MAX_EXTENTS // 2:
            del table[MAX_EXTENTS // 2 :]
        else:
            del table[: MAX_EXTENTS // 2]

    def forget(self, offset: int, length: int) -> None:
        """Drop what is known of a range."""
        end = offset + length
        _cut(self._table, offset, end)
        for chunks in self._maps:
            chunks.clear(offset >> self._shift, -(-end >> self._shift))
        self.hot = NOTHING


def _last_before(table: list[Entry], offset: int) -> int:
    """The index of the last entry that begins at `offset` or before; -1 if there is none."""
    return bisect_right(table, (offset, FAR + 1, 0, 0)) - 1


def _cut(table: list[Entry], start: int, end: int) -> None:
    """Take the range out of the table; what reaches beyond it stays."""
    first = max(_last_before(table, start), 0)
    last = first
    kept = []
    while last < len(table) and table[last][0] < end:
        old_start, old_end, fd, delta = table[last]
        if old_start < start:
            kept.append((old_start, min(old_end, start), fd, delta))
        if old_end > end:
            kept.append((max(end, old_start), old_end, fd, delta))
        last += 1
    table[first:last] = kept
