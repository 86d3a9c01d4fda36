"""Reads that the host's page cache can answer at once, without leaving the task.

preadv2(2) with RWF_NOWAIT copies what is in the page cache and refuses to wait for the rest.  The
hottest loop of the data path: everything in it is there because it was measured.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Iterator, Sequence

from xbd.core.blkif import Rejected, Request, Single, Transfer, constants
from xbd.core.datapath.chunk_map import ChunkMap
from xbd.core.datapath.config import DiskStats
from xbd.core.datapath.extents import NOTHING, KnownExtents
from xbd.core.datapath.pages import GuestPages
from xbd.core.units import PAGE_SIZE

INLINE_BYTES = 128 * 1024
"""Longer reads would keep the other rings waiting."""

TURN_BYTES = 8 << 20
"""So do many of them: the rest of the batch goes the ordinary way."""

NO_MAP = ChunkMap(-1, 0)

Item = tuple[int, Single | Request | Rejected]
"""A journal slot and its request."""
Answer = tuple[int, int, int, int]
"""A journal slot, and the id, operation and status of its response."""


class CachedReads:
    """For one ring.  Only for pages that are mapped already."""

    def __init__(self, extents: KnownExtents, pages: GuestPages, stats: DiskStats) -> None:
        self._extents = extents
        self._pages = pages
        self._stats = stats
        self._cached: dict[int, bool] = {NOTHING[2]: False}
        """By fd: whether it goes through the page cache, and can be asked without waiting."""
        self.useful = True
        """Whether there may be any file that can be asked."""

    def learn(self, fd: int) -> bool:
        """Look once how a file was opened: whether it can be asked."""
        if fd not in self._cached:
            self._cached[fd] = not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
            self.useful = any(self._cached.values())
        return self._cached[fd]

    def _find(self, offset: int, length: int) -> tuple[int, int]:
        """The file, and where in it, if that can be asked; -1 and anything if not."""
        found = self._extents.find(offset, length)
        if found is None or len(found) > 1:
            return -1, 0
        [(fd, position, _)] = found
        return (fd if self.learn(fd) else -1), position

    def serve(self, items: Iterator[Item], rest: deque[Item]) -> list[Answer]:
        """Do what can be done now; its answers.  Everything else goes to `rest`."""
        answers: list[Answer] = []
        extents = self._extents
        start, end, hot_fd, hot_delta = extents.hot
        hot = self._cached.get(hot_fd)
        if hot is None:
            hot = self.learn(hot_fd)
        strayed = False
        if hot:
            words, map_fd, shift, in_chunk, last_page = NO_MAP.view
        else:
            words, map_fd, shift, in_chunk, last_page = extents.hot_map.view
            if not self.learn(map_fd):
                words = NO_MAP.words
        find_page = self._pages.resident.get
        batch = self._pages.batch
        preadv, nowait, okay, read = os.preadv, os.RWF_NOWAIT, constants.RSP_OKAY, constants.READ
        append = answers.append
        buffers: Sequence[memoryview]
        size, fd = 0, -1
        for slot, request in items:
            try:
                if isinstance(request, tuple):
                    request_id, operation, offset, length, gref, first = request
                    page = find_page(gref)
                    if not page or operation != read:
                        rest.append((slot, request))
                        continue
                    if hot and start <= offset and offset + length <= end:
                        fd = hot_fd
                        position = offset + hot_delta
                    else:
                        try:
                            word = words[offset >> shift]
                        except IndexError:
                            word = 0
                        if word and offset & in_chunk <= last_page:
                            fd = map_fd
                            position = offset + word - 1
                        else:
                            fd, position = self._find(offset, length)
                            if fd < 0:
                                rest.append((slot, request))
                                continue
                            strayed = True
                    page.used = batch
                    if length == PAGE_SIZE:
                        buffers = (page.view,)
                    else:
                        buffers = [page.view[first : first + length]]
                elif isinstance(request, Transfer) and request.operation == read:
                    request_id, operation, length = request.id, read, request.length
                    offset = request.offset
                    buffers = ()
                    if length <= INLINE_BYTES and size < TURN_BYTES:
                        buffers = self._resident(request)
                    if not buffers:
                        rest.append((slot, request))
                        continue
                    if hot and start <= offset and offset + length <= end:
                        fd = hot_fd
                        position = offset + hot_delta
                    else:
                        fd, position = self._find(offset, length)
                    if fd < 0:
                        rest.append((slot, request))
                        continue
                else:
                    # What is behind a barrier stays behind it; nothing else has an order.
                    rest.append((slot, request))
                    if request.operation == constants.WRITE_BARRIER:
                        rest.extend(items)
                        break
                    continue
                if preadv(fd, buffers, position, nowait) == length:
                    append((slot, request_id, operation, okay))
                    size += length
                    continue
            except BlockingIOError:
                pass  # not in the page cache: the engine reads it
            except OSError:
                self._cached[fd] = False  # this file can't be asked that way
            rest.append((slot, request))
        if hot and strayed:
            extents.hot = NOTHING  # it does not serve even one batch alone
        self._stats.rd_req += len(answers)
        self._stats.rd_bytes += size
        return answers

    def _resident(self, request: Transfer) -> list[memoryview]:
        """The request's memory; nothing if some of its pages are not mapped."""
        find_page = self._pages.resident.get
        buffers = []
        for ref, first, size in request.segments:
            page = find_page(ref)
            if page is None:
                return []
            page.used = self._pages.batch
            buffers.append(page.view if size == PAGE_SIZE else page.view[first : first + size])
        return buffers
