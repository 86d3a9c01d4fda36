"""Boundary B, XenStore: the interface, a client on trio, and an embedded server."""

from xbd.core.xenstore.base import Store, StoreReader, Watch

__all__ = ["Store", "StoreReader", "Watch"]
