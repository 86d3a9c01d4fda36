"""A disk as clients see it."""

from __future__ import annotations

from typing import Final

import attrs

from xbd.core.driver import Capability, DeviceAccess
from xbd.core.driver.geometry import request_unit
from xbd.core.errors import ConfigError
from xbd.core.nbd.constants import MAX_STRING, TransmissionFlag

_MAX_MINIMUM: Final = 1 << 16
_PREFERRED: Final = 4096

_ALWAYS: Final = (
    TransmissionFlag.HAS_FLAGS
    # All connections go through one `DeviceAccess`, so a flush covers what any of them wrote.
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
_WRITABLE: Final = (
    # Without Capability.FLUSH every write is durable, and there is nothing left to do.
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    # Without Capability.WRITE_ZEROES zeroes are written: that still spares sending them.
    | TransmissionFlag.SEND_WRITE_ZEROES
)


def _fits(_export: Export, attribute: attrs.Attribute[str], value: str) -> None:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"an export's {attribute.name} must be UTF-8") from None
    if len(data) > MAX_STRING or b"\0" in data:
        raise ConfigError(f"an export's {attribute.name} has at most {MAX_STRING} bytes, no NUL")


@attrs.frozen(kw_only=True)
class Export:
    """One disk under one name; the empty name always means it, too.

    Raises `ConfigError` if the protocol can't carry the name or the description.
    """

    access: DeviceAccess
    name: str = attrs.field(default="", validator=_fits)
    description: str = attrs.field(default="", validator=_fits)

    @property
    def size(self) -> int:
        """In bytes, now."""
        return self.access.geometry.size

    def is_called(self, name: bytes) -> bool:
        """Whether a client that asks for `name` means this one."""
        return name in (b"", self.name.encode())

    def flags(self, *, structured: bool) -> TransmissionFlag:
        """The transmission flags; `structured`: whether replies are."""
        capabilities = self.access.capabilities
        flags = _ALWAYS
        if Capability.WRITE in capabilities:
            flags |= _WRITABLE
            if Capability.DISCARD in capabilities:
                flags |= TransmissionFlag.SEND_TRIM
        else:
            flags |= TransmissionFlag.READ_ONLY
        return flags | TransmissionFlag.SEND_DF if structured else flags

    def block_sizes(self) -> tuple[int, int]:
        """Minimum and preferred block size, in bytes.

        The minimum is the disk's sector, for clients that make a block device of it; requests
        may be smaller all the same.
        """
        geometry = self.access.geometry
        minimum = min(geometry.logical_block, _MAX_MINIMUM)
        return minimum, max(minimum, request_unit(geometry), geometry.physical_block, _PREFERRED)
