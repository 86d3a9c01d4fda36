"""Reads that the host's page cache can answer at once, without leaving the task.

preadv2(2) with RWF_NOWAIT copies what is in the page cache and refuses to wait for the rest.  The
hottest loop of the data path: everything in it is there because it was measured.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Iterator

from xbd.core.blkif import Rejected, Request, Single, Transfer, constants
from xbd.core.datapath.config import DiskStats
from xbd.core.datapath.extents import ExtentCache
from xbd.core.datapath.pages import GuestPages
from xbd.core.units import PAGE_SIZE

INLINE_BYTES = 128 * 1024
"""Longer reads would keep the other rings waiting."""

TURN_BYTES = 8 << 20
"""So do many of them: the rest of the batch goes the ordinary way."""

Item = tuple[int, Single | Request | Rejected]
"""A journal slot and its request."""
Answer = tuple[int, int, int, int]
"""A journal slot, and the id, operation and status of its response."""


class CachedReads:
    """For one ring.  Only for pages that are mapped already and extents that are known."""

    def __init__(self, extents: ExtentCache, pages: GuestPages, stats: DiskStats) -> None:
        self._extents = extents
        self._pages = pages
        self._stats = stats
        self._cached: dict[int, bool] = {}
        """By fd: whether it goes through the page cache, and can be asked without waiting."""
        self.useful = False
        """Whether there is any such fd."""

    def learn(self, fd: int) -> None:
        """Look once how a file was opened."""
        if fd not in self._cached:
            cached = not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
            self._cached[fd] = cached
            self.useful = self.useful or cached

    def serve(self, items: Iterator[Item], rest: deque[Item]) -> list[Answer]:
        """Do what can be done now; its answers.  Everything else goes to `rest`."""
        answers: list[Answer] = []
        start, end, fd, delta = self._extents.hot[0]
        if not self._cached.get(fd):
            rest.extend(items)
            return answers
        find_page = self._pages.resident.get
        batch = self._pages.batch
        preadv, nowait, okay, read = os.preadv, os.RWF_NOWAIT, constants.RSP_OKAY, constants.READ
        append = answers.append
        size = 0
        for slot, request in items:
            if isinstance(request, tuple):
                request_id, operation, offset, length, gref, first = request
                page = find_page(gref)
                if page and start <= offset and offset + length <= end and operation == read:
                    page.used = batch
                    if length == PAGE_SIZE:
                        buffers = [page.view]
                    else:
                        buffers = [page.view[first : first + length]]
                else:
                    buffers = []
            elif isinstance(request, Transfer) and request.operation == read:
                request_id, operation, length = request.id, read, request.length
                offset = request.offset
                buffers = []
                if offset >= start and offset + length <= end and length <= INLINE_BYTES:
                    buffers = self._resident(request) if size < TURN_BYTES else []
            else:
                # What is behind a barrier stays behind it; nothing else has an order.
                rest.append((slot, request))
                if request.operation == constants.WRITE_BARRIER:
                    rest.extend(items)
                    break
                continue
            try:
                if buffers and preadv(fd, buffers, offset + delta, nowait) == length:
                    append((slot, request_id, operation, okay))
                    size += length
                    continue
            except BlockingIOError:
                pass  # not in the page cache: the engine reads it
            except OSError:
                self._cached[fd] = False  # this file can't be asked that way
            rest.append((slot, request))
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
