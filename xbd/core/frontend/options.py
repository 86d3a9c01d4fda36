"""How a user-space frontend behaves: every choice that real frontends make differently."""

from __future__ import annotations

import attrs

from xbd.core.blkif import X86_64, Abi


@attrs.frozen(kw_only=True)
class FrontendOptions:
    """What to use of that which a backend offers; offers that are smaller win."""

    abi: Abi = X86_64
    write_protocol: bool = True
    """False: leave the ``protocol`` key out, as old frontends do."""
    ring_order: int = 0
    legacy_ring_key: bool = False
    """Write ``num-ring-pages`` instead of ``ring-page-order``."""
    queues: int = 1
    persistent: bool = True
    indirect_segments: int = 32
    """Longest request in pages; 0 to 11: no indirect requests."""
    data_pages: int = 512
    """Pages for data; requests wait while there are too few."""
