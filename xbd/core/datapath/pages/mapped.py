"""Pages that are mapped for one request and unmapped before its answer."""

from __future__ import annotations

from collections.abc import Sequence

from xbd.core.blkif import Indirect, Transfer
from xbd.core.datapath.pages.base import GuestPages, Page, Work, grant_refs, indirect_lengths
from xbd.core.hypervisor import GrantMapping, Hypervisor
from xbd.core.units import PAGE_SIZE, Domid


class MappedPages(GuestPages):
    """All pages of a request in one mapping, read-only where the guest only gives."""

    mode = "map"

    def __init__(self, hypervisor: Hypervisor, domid: Domid) -> None:
        self.resident: dict[int, Page] = {}
        self.batch = 0
        self._hypervisor = hypervisor
        self._domid = domid

    def attach(self, slot: int, request: Transfer) -> Work | None:
        return map_request(self._hypervisor, self._domid, slot, request)

    def fetch(self, works: Sequence[Work]) -> None:
        return

    def finish(self, works: Sequence[Work]) -> None:
        for work in works:
            unmap_request(work)

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


def map_request(hypervisor: Hypervisor, domid: Domid, slot: int, request: Transfer) -> Work:
    """Map one request's pages.  Raises `GrantFailed`."""
    mapping = hypervisor.map_grants(domid, grant_refs(request), writable=not request.write)
    parts = []
    for i, (_, start, length) in enumerate(request.segments):
        at = i * PAGE_SIZE + start
        parts.append((mapping.view, at, length, mapping.address + at))
    return Work(slot, request, parts, held=mapping)


def unmap_request(work: Work) -> None:
    """Give one request's own mapping back, if it has one."""
    work.release_views()
    work.parts.clear()
    if isinstance(work.held, GrantMapping):
        work.held.unmap()
    work.held = None
