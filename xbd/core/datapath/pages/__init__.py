"""Guest pages as buffers: persistent, mapped per request, or copied."""

from __future__ import annotations

from xbd.core.datapath.config import GrantMode
from xbd.core.datapath.pages.base import GuestPages, Page, Work
from xbd.core.datapath.pages.budget import Budgets, DomainBudget, RingShare
from xbd.core.datapath.pages.copied import CopiedPages
from xbd.core.datapath.pages.mapped import MappedPages
from xbd.core.datapath.pages.persistent import MAX_PAGES, PAGES_PER_REQUEST, PersistentPages
from xbd.core.errors import BoundaryError
from xbd.core.hypervisor import Hypervisor
from xbd.core.units import Domid

__all__ = [
    "Budgets",
    "DomainBudget",
    "GuestPages",
    "Page",
    "RingShare",
    "Work",
    "choose_mode",
    "make_pages",
]


def choose_mode(wanted: GrantMode, hypervisor: Hypervisor, *, persistent: bool) -> GrantMode:
    """The way that will be used.  `persistent`: offered by us and used by the frontend.

    Raises `BoundaryError` when the wanted way is impossible here.
    """
    if wanted is GrantMode.AUTO:
        if persistent and hypervisor.can_map:
            return GrantMode.PERSISTENT
        return GrantMode.COPY if hypervisor.can_copy else GrantMode.MAP
    if wanted is GrantMode.PERSISTENT and not persistent:
        wanted = GrantMode.MAP
    possible = hypervisor.can_copy if wanted is GrantMode.COPY else hypervisor.can_map
    if not possible:
        raise BoundaryError(
            f"grants = {wanted.value!r} is not possible on {hypervisor.name}; use 'auto'"
        )
    return wanted


def make_pages(
    mode: GrantMode, hypervisor: Hypervisor, domid: Domid, share: RingShare, entries: int
) -> GuestPages:
    """The pages of a ring of `entries` requests, in a mode from `choose_mode`."""
    if mode is GrantMode.PERSISTENT:
        limit = min(entries * PAGES_PER_REQUEST, MAX_PAGES)
        return PersistentPages(hypervisor, domid, share, limit)
    if mode is GrantMode.COPY:
        return CopiedPages(hypervisor, domid, share)
    return MappedPages(hypervisor, domid, share)
