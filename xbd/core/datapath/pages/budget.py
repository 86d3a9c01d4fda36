"""How many pages of one domain are mapped or bounced at a time, all its rings together (XSA-300).

A hypervisor has room for a limited number of mappings (Xen's maptrack: 262144 for a whole dom0),
and who uses them up stops the other guests.  Every ring has a reserve that holds its longest
request, so a ring never waits for another one; what it uses beyond that comes out of its domain's
budget.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakValueDictionary

import attrs

DOMAIN_PAGES: Final = 32768
"""Pages of one domain beyond its rings' reserves: 128 MiB."""
RESERVE: Final = 264
"""Pages that every ring may use: a request of 256 segments and its indirect pages."""


@attrs.define(eq=False)
class DomainBudget:
    """One domain's."""

    free: int = DOMAIN_PAGES


class Budgets:
    """By domain, for as long as anything of the domain is served."""

    def __init__(self, pages_per_domain: int = DOMAIN_PAGES) -> None:
        self._pages = pages_per_domain
        self._domains: WeakValueDictionary[int, DomainBudget] = WeakValueDictionary()

    def of(self, domid: int) -> DomainBudget:
        """The domain's budget, the same one while anybody holds it."""
        budget = self._domains.get(domid)
        if budget is None:
            budget = self._domains[domid] = DomainBudget(self._pages)
        return budget


class RingShare:
    """One ring's part."""

    def __init__(self, domain: DomainBudget, longest: int) -> None:
        """`longest`: segments of the longest request that is offered."""
        self.used = 0
        self._domain = domain
        self._reserve = max(RESERVE, longest + 8)

    def take(self, count: int) -> bool:
        """Use more pages; False: not now.  Never False for a request while none are in use."""
        more = self._beyond(self.used + count) - self._beyond(self.used)
        if more > self._domain.free:
            return False
        self._domain.free -= more
        self.used += count
        return True

    def give_back(self, count: int) -> None:
        """Use fewer."""
        self._domain.free += self._beyond(self.used) - self._beyond(self.used - count)
        self.used -= count

    def _beyond(self, used: int) -> int:
        return max(0, used - self._reserve)
