"""The arguments in a request's payload."""

from __future__ import annotations

import errno

from xbd.core.errors import StoreError
from xbd.core.xenstore.protocol import NUL, Packet, strings


def several(request: Packet, count: int) -> list[bytes]:
    """Exactly `count` NUL-terminated strings.  Raises `StoreError` (EINVAL)."""
    parts = strings(request.payload)
    if len(parts) != count or not request.payload.endswith(NUL):
        raise StoreError(f"{count} arguments, please", errno=errno.EINVAL)
    return parts


def one(request: Packet) -> bytes:
    """The only string.  Raises `StoreError` (EINVAL)."""
    return several(request, 1)[0]


def number(text: bytes) -> int:
    """Decimal, without a sign.  Raises `StoreError` (EINVAL)."""
    if not text.isdigit() or len(text) > 20:
        raise StoreError("a number, please", errno=errno.EINVAL)
    return int(text)
