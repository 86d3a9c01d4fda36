"""What one domain other than domain 0 may have; the numbers are xenstored's own."""

from __future__ import annotations

import attrs


@attrs.frozen
class Quotas:
    nodes: int = 1000
    """Nodes owned."""
    node_size: int = 2048
    """Bytes of one node: value, names of children, permissions."""
    permissions: int = 5
    """Entries in one node's list."""
    watches: int = 128
    transactions: int = 10
    """Open at the same time."""
    transaction_nodes: int = 1024
    """Nodes that one transaction touches."""
    connections: int = 8
    """To the domain's socket at the same time."""
