"""Pages that the hypervisor copies to and from memory of our own, one call per wake-up."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

from xbd.core.blkif import Indirect, Transfer, constants
from xbd.core.datapath.pages.base import GuestPages, Page, Work, indirect_lengths
from xbd.core.datapath.pages.budget import RingShare
from xbd.core.errors import GrantFailed
from xbd.core.hypervisor import CopyOp, Hypervisor
from xbd.core.units import PAGE_SIZE, Domid

MAX_BOUNCE_PAGES = 4096
"""Bounce memory per ring: 16 MiB, allocated as it is touched."""


class CopiedPages(GuestPages):
    """Bounce pages, one per segment; requests wait while there are none left."""

    mode = "copy"

    def __init__(
        self,
        hypervisor: Hypervisor,
        domid: Domid,
        share: RingShare,
        pages: int = MAX_BOUNCE_PAGES,
    ) -> None:
        self.resident: dict[int, Page] = {}
        self.batch = 0
        self._hypervisor = hypervisor
        self._domid = domid
        self._share = share
        memory = mmap.mmap(-1, pages * PAGE_SIZE)
        self._view = memoryview(memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._free = list(range(pages - 1, -1, -1))

    def attach(self, slot: int, request: Transfer) -> Work | None:
        free = self._free
        count = len(request.segments)
        if len(free) < count or not self._share.take(count):
            return None
        parts = []
        held = []
        for _, start, length in request.segments:
            page = free.pop()
            held.append(page)
            at = page * PAGE_SIZE + start
            parts.append((self._view, at, length, self._address + at))
        return Work(slot, request, parts, held=held)

    def fetch(self, works: Sequence[Work]) -> None:
        self._copy([work for work in works if work.request.write], to_guest=False)

    def finish(self, works: Sequence[Work]) -> None:
        okay = constants.RSP_OKAY
        reads = [work for work in works if not work.request.write and work.status == okay]
        self._copy(reads, to_guest=True)
        for work in works:
            work.release_views()
            work.parts.clear()
            self._free.extend(work.held)  # type: ignore[arg-type]
            self._share.give_back(len(work.request.segments))
            work.held = None

    def _copy(self, works: Sequence[Work], *, to_guest: bool) -> None:
        ops = []
        owners = []
        for work in works:
            for (ref, start, length), (view, at, _, _) in zip(
                work.request.segments, work.parts, strict=True
            ):
                ops.append(CopyOp(ref, start, view[at : at + length], to_guest))
                owners.append(work)
        for work, status in zip(owners, self._run(ops), strict=True):
            if status:
                work.status = constants.RSP_ERROR

    def _run(self, ops: list[CopyOp]) -> list[int]:
        if not ops:
            return []
        try:
            return self._hypervisor.copy_grants(self._domid, ops)
        except GrantFailed:
            return [constants.RSP_ERROR] * len(ops)
        finally:
            for op in ops:
                op.local.release()

    def read_indirect(self, request: Indirect) -> list[bytes]:
        copies = [bytearray(length) for length in indirect_lengths(request)]
        ops = [
            CopyOp(ref, 0, memoryview(copy), False)
            for ref, copy in zip(request.refs, copies, strict=True)
        ]
        if any(self._run(ops)):
            raise GrantFailed("an indirect page can't be copied from the guest")
        return [bytes(copy) for copy in copies]

    def close(self) -> None:
        """Let go of the bounce memory: it goes with the last buffer that anybody has of it."""
        self._view.release()
