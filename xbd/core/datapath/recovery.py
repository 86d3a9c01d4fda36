"""Going on where a backend died, without the guest noticing.

The guest's requests are still granted and unanswered, the ring is in its memory, and the journal
tells which requests were consumed.  They are carried out again: reading twice is harmless, and a
write that was not acknowledged may be done again whole.

A journal is believed only if the ring bears it out.  The guest may have started another kernel
meanwhile, whose ring has by chance the same pages and the same port: then its requests differ, and
carrying out the old ones would write into memory that is used for something else by now.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from xbd.core.blkif import BackRing
from xbd.core.datapath.journal import Debt, RingIdentity, distance, read_journal

_log = structlog.get_logger()


def take_over(path: Path | None, identity: RingIdentity, ring: BackRing) -> Debt:
    """What an earlier backend owes this ring; `ring` goes on behind it.

    Nothing if there was none, or if its journal means another ring.
    """
    debt = read_journal(path, identity, ring.rsp_prod_pvt) if path is not None else None
    if debt is None or not debt.requests:
        return Debt(overlaid=ring.rsp_prod_pvt)
    count = len(debt.requests)
    if not _borne_out(debt, ring):
        _log.warning("the journal means another ring", path=str(path), requests=count)
        return Debt(overlaid=ring.rsp_prod_pvt)
    ring.resume(count)
    _log.info("going on where the last backend died", path=str(path), requests=count)
    return debt


def _borne_out(debt: Debt, ring: BackRing) -> bool:
    """Whether the ring has these requests, as far as no answer lies over them."""
    if len(debt.requests) > ring.unanswered:
        return False
    first = ring.rsp_prod_pvt
    overlaid = distance(first, debt.overlaid)
    for request in debt.requests:
        ahead = distance(first, request.index)
        if ahead >= len(debt.requests):
            return False  # it would not have been consumed
        if ahead >= overlaid and ring.slot(request.index) != request.entry:
            return False
    return True
