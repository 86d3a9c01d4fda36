"""Pages that stay mapped, because the frontend grants the same ones again and again."""

from __future__ import annotations

from collections.abc import Sequence

from xbd.core.blkif import Indirect, Transfer
from xbd.core.datapath.pages.base import GuestPages, Page, Work, indirect_lengths
from xbd.core.datapath.pages.budget import RingShare
from xbd.core.datapath.pages.mapped import RequestMapper
from xbd.core.hypervisor import Hypervisor
from xbd.core.units import Domid, GrantRef

PAGES_PER_REQUEST = 33
"""Mapped pages per entry of a ring: xen-blkback's measure, 32 segments and an indirect page."""
MAX_PAGES = 8448
"""Mapped pages per ring at most, whatever its size."""
_PURGE_PART = 20
"""One in so many pages is unmapped at a time."""


class PersistentPages(GuestPages):
    """A bounded table of mapped pages; the least recently used go first."""

    mode = "persistent"

    def __init__(self, hypervisor: Hypervisor, domid: Domid, share: RingShare, limit: int) -> None:
        self.resident: dict[int, Page] = {}
        self.batch = 0
        self._hypervisor = hypervisor
        self._domid = domid
        self._limit = limit
        self._share = share
        self._mapper = RequestMapper(hypervisor, domid, share)

    def attach(self, slot: int, request: Transfer) -> Work | None:
        resident = self.resident
        batch = self.batch
        parts = []
        held: list[Page] = []
        for ref, start, length in request.segments:
            page = resident.get(ref)
            if page is None:
                page = self._admit(ref, held)
                if page is None:
                    return self._mapper.map(slot, request)
            page.used = batch
            held.append(page)
            parts.append((page.view, start, length, page.address + start))
        for page in held:
            page.users += 1
        return Work(slot, request, parts, held=held)

    def _admit(self, ref: GrantRef, keep: Sequence[Page]) -> Page | None:
        """Map one more page; None when there is only room for pages in use."""
        if len(self.resident) >= self._limit or not self._share.take(1):
            if not self._purge(keep):
                return None
            self._share.take(1)
        try:
            mapping = self._hypervisor.map_grants(self._domid, [ref], writable=True)
        except BaseException:
            self._share.give_back(1)
            raise
        page = Page(mapping.view, mapping.address, mapping, self.batch)
        self.resident[ref] = page
        return page

    def _purge(self, keep: Sequence[Page]) -> bool:
        kept = {id(page) for page in keep}
        idle = [
            (page.used, ref)
            for ref, page in self.resident.items()
            if not page.users and id(page) not in kept
        ]
        idle.sort()
        for _, ref in idle[: max(1, self._limit // _PURGE_PART)]:
            self._drop(self.resident.pop(ref))
        return bool(idle)

    def _drop(self, page: Page) -> None:
        page.mapping.unmap()
        self._share.give_back(1)

    def fetch(self, works: Sequence[Work]) -> None:
        return

    def finish(self, works: Sequence[Work]) -> None:
        for work in works:
            if isinstance(work.held, list):
                for page in work.held:
                    page.users -= 1  # type: ignore[union-attr]
                if work.views:
                    work.release_views()
            else:
                self._mapper.unmap(work)

    def read_indirect(self, request: Indirect) -> list[bytes]:
        copies = []
        for ref, length in zip(request.refs, indirect_lengths(request), strict=True):
            page = self.resident.get(ref) or self._admit(ref, ())
            if page is not None:
                page.used = self.batch
                copies.append(bytes(page.view[:length]))
                continue
            mapping = self._hypervisor.map_grants(self._domid, [ref], writable=False)
            try:
                copies.append(bytes(mapping.view[:length]))
            finally:
                mapping.unmap()
        return copies

    def close(self) -> None:
        """Unmap all idle pages.  Pages of abandoned I/O stay mapped on purpose."""
        for page in self.resident.values():
            if not page.users:
                self._drop(page)
        self.resident.clear()
