"""Reads that the host's page cache can answer at once, without leaving the task.

preadv2(2) with RWF_NOWAIT copies what is in the page cache and refuses to wait for the rest.  The
hottest loop of the data path: everything in it is there because it was measured.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Iterable

from xbd.core.blkif import Rejected, Request, Transfer, constants
from xbd.core.datapath.config import DiskStats
from xbd.core.datapath.extents import ExtentCache
from xbd.core.datapath.pages import GuestPages
from xbd.core.units import PAGE_SIZE

INLINE_BYTES = 128 * 1024
"""Longer reads would keep the other rings waiting."""

Item = tuple[int, Request | Rejected]
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

    def serve(self, items: Iterable[Item], rest: deque[Item]) -> list[Answer]:
        """Do what can be done now; its answers.  Everything else goes to `rest`."""
        answers: list[Answer] = []
        start, end, fd, delta = self._extents.hot[0]
        if not self._cached.get(fd):
            rest.extend(items)
            return answers
        find_page = self._pages.resident.get
        batch = self._pages.batch
        preadv, nowait, okay = os.preadv, os.RWF_NOWAIT, constants.RSP_OKAY
        count = size = 0
        barrier = False
        for item in items:
            slot, request = item
            if type(request) is Transfer and request.operation == constants.READ and not barrier:
                offset = request.offset
                length = request.length
                if start <= offset and offset + length <= end and length <= INLINE_BYTES:
                    buffers = []
                    for ref, first, part in request.segments:
                        page = find_page(ref)
                        if page is None:
                            break
                        page.used = batch
                        view = page.view
                        buffers.append(view if part == PAGE_SIZE else view[first : first + part])
                    else:
                        try:
                            if preadv(fd, buffers, offset + delta, nowait) == length:
                                answers.append((slot, request.id, request.operation, okay))
                                count += 1
                                size += length
                                continue
                        except BlockingIOError:
                            pass  # not in the page cache: the engine reads it
                        except OSError:
                            self._cached[fd] = False  # this file can't be asked that way
            # What is behind a barrier stays behind it; everything else has no order.
            barrier = barrier or request.operation == constants.WRITE_BARRIER
            rest.append(item)
        self._stats.rd_req += count
        self._stats.rd_bytes += size
        return answers
