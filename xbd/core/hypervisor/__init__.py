"""Boundary A, pages and ports: the interface, its Xen and its embedded implementation."""

from xbd.core.hypervisor.base import CopyOp, EventChannel, GrantMapping, Hypervisor

__all__ = ["CopyOp", "EventChannel", "GrantMapping", "Hypervisor"]
