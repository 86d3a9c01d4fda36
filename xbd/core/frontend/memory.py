"""A guest's data pages: granted once and kept, or for each request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import Domid, GrantRef


class DataPages:
    """A pool of pages for requests' data."""

    def __init__(self, guest: GuestDomain, backend: Domid, count: int, *, persistent: bool) -> None:
        self._guest = guest
        self._backend = backend
        self._persistent = persistent
        self._all = guest.alloc_pages(count)
        self._free = list(self._all)
        self._returned = trio.lowlevel.ParkingLot()
        if persistent:
            for ref in self._all:
                guest.grant(ref, backend, readonly=False)

    async def take(self, count: int) -> list[GrantRef]:
        """Pages for one request; waits until there are as many."""
        assert count <= len(self._all), "a request longer than all data pages"
        while len(self._free) < count:
            await self._returned.park()
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def give_back(self, pages: Sequence[GrantRef]) -> None:
        """The request that used them is answered."""
        self._free.extend(pages)
        self._returned.unpark_all()

    @contextmanager
    def granted(self, pages: Sequence[GrantRef], *, readonly: bool) -> Iterator[None]:
        """While inside, the backend may use the pages."""
        if self._persistent:
            yield
            return
        for ref in pages:
            self._guest.grant(ref, self._backend, readonly=readonly)
        try:
            yield
        finally:
            for ref in pages:
                self._guest.revoke(ref)

    def release(self) -> None:
        """Take everything back; the disk is disconnected."""
        if self._persistent:
            for ref in self._all:
                self._guest.revoke(ref)
        self._guest.free_pages(self._all)
