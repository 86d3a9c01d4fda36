"""Pages that are mapped for one request and unmapped before its answer."""

from __future__ import annotations

from collections.abc import Sequence

from xbd.core.blkif import Indirect, Transfer
from xbd.core.datapath.pages.base import GuestPages, Page, Work, grant_refs, indirect_lengths
from xbd.core.datapath.pages.budget import RingShare
from xbd.core.hypervisor import GrantMapping, Hypervisor
from xbd.core.units import PAGE_SIZE, Domid


class RequestMapper:
    """Maps all pages of a request at once, read-only where the guest only gives."""

    def __init__(self, hypervisor: Hypervisor, domid: Domid, share: RingShare) -> None:
        self._hypervisor = hypervisor
        self._domid = domid
        self._share = share

    def map(self, slot: int, request: Transfer) -> Work | None:
        """The request with its pages; None: too many are mapped until another one is finished.

        Raises `GrantFailed`.
        """
        count = len(request.segments)
        if not self._share.take(count):
            return None
        try:
            mapping = self._hypervisor.map_grants(
                self._domid, grant_refs(request), writable=not request.write
            )
        except BaseException:
            self._share.give_back(count)
            raise
        parts = []
        for i, (_, start, length) in enumerate(request.segments):
            at = i * PAGE_SIZE + start
            parts.append((mapping.view, at, length, mapping.address + at))
        return Work(slot, request, parts, held=mapping)

    def unmap(self, work: Work) -> None:
        """Give one request's own mapping back, if it has one."""
        work.release_views()
        work.parts.clear()
        if isinstance(work.held, GrantMapping):
            work.held.unmap()
            self._share.give_back(len(work.request.segments))
        work.held = None


class MappedPages(GuestPages):
    """Each request's pages in a mapping of their own."""

    mode = "map"

    def __init__(self, hypervisor: Hypervisor, domid: Domid, share: RingShare) -> None:
        self.resident: dict[int, Page] = {}
        self.batch = 0
        self._hypervisor = hypervisor
        self._domid = domid
        self._mapper = RequestMapper(hypervisor, domid, share)

    def attach(self, slot: int, request: Transfer) -> Work | None:
        return self._mapper.map(slot, request)

    def fetch(self, works: Sequence[Work]) -> None:
        return

    def finish(self, works: Sequence[Work]) -> None:
        for work in works:
            self._mapper.unmap(work)

    def read_indirect(self, request: Indirect) -> list[bytes]:
        mapping = self._hypervisor.map_grants(self._domid, request.refs, writable=False)
        try:
            return [
                bytes(mapping.view[i * PAGE_SIZE : i * PAGE_SIZE + length])
                for i, length in enumerate(indirect_lengths(request))
            ]
        finally:
            mapping.unmap()

    def close(self) -> None:
        return
