"""Number types that must not be mixed up, and the sizes everyone shares."""

from __future__ import annotations

from typing import Final, NewType

Domid = NewType("Domid", int)
"""A Xen domain's number."""

GrantRef = NewType("GrantRef", int)
"""A page that a domain has granted, by its place in that domain's grant table."""

Port = NewType("Port", int)
"""An event channel's number, valid only inside the domain that owns it."""

PAGE_SIZE: Final = 4096
"""Bytes in a granted page (xen/include/public/grant_table.h: grants are always of 4 KiB)."""

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
