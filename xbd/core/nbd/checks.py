"""What a request must be like to be carried out.

NBD protocol document, sections "Command flags", "Request types" and "Error values".
"""

from __future__ import annotations

from typing import Final

from xbd.core.nbd import constants as nbd
from xbd.core.nbd.constants import TransmissionFlag
from xbd.core.nbd.errors import BadClient
from xbd.core.nbd.export import Export
from xbd.core.nbd.negotiation import Agreed

Problem = tuple[int, bytes]
"""The protocol's error value, and a text for people."""

_CHANGES: Final = frozenset({nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES})
_GROWS: Final = frozenset({nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES})
_CARRIES_DATA: Final = frozenset({nbd.CMD_READ, nbd.CMD_WRITE})

_UNKNOWN: Final = (nbd.EINVAL, b"unknown command")
_READ_ONLY: Final = (nbd.EPERM, b"the export is read-only")
_FLAGS: Final = (nbd.EINVAL, b"a flag that the command does not have")
_LENGTH: Final = (nbd.EINVAL, b"more data than one request may carry")
_BEYOND: Final = (nbd.EINVAL, b"beyond the end of the export")
_NO_SPACE: Final = (nbd.ENOSPC, b"beyond the end of the export")
_EMPTY: Final = (nbd.EINVAL, b"an empty range has no status")


class Checks:
    """For one client: by what was agreed with it."""

    def __init__(self, export: Export, agreed: Agreed) -> None:
        self._access = export.access
        self._read_only = TransmissionFlag.READ_ONLY in agreed.flags
        self._flags = _flags_by_command(agreed)

    def problem(self, kind: int, flags: int, offset: int, length: int) -> Problem | None:
        """Why a request can't be carried out; None: it can.

        Raises `BadClient` if what follows the request can't be understood, either.
        """
        if kind == nbd.CMD_WRITE and length > nbd.MAX_PAYLOAD:
            raise BadClient(f"a write of {length} bytes")
        allowed = self._flags.get(kind)
        if allowed is None:
            return _READ_ONLY if self._read_only and kind in _CHANGES else _UNKNOWN
        if flags & ~allowed:
            return _FLAGS
        if kind == nbd.CMD_FLUSH:  # its range is reserved
            return None
        if length > nbd.MAX_PAYLOAD and kind in _CARRIES_DATA:
            return _LENGTH
        if offset + length > self._access.geometry.size:
            return _NO_SPACE if kind in _GROWS else _BEYOND
        if kind == nbd.CMD_BLOCK_STATUS and not length:
            return _EMPTY
        return None


def _flags_by_command(agreed: Agreed) -> dict[int, int]:
    """The flags that may be set on each command that may be sent."""
    offered = agreed.flags
    fua = nbd.CMD_FLAG_FUA if TransmissionFlag.SEND_FUA in offered else 0
    df = nbd.CMD_FLAG_DF if TransmissionFlag.SEND_DF in offered else 0
    flags = {
        nbd.CMD_READ: fua | df,
        nbd.CMD_CACHE: fua,
        # Harmless where it was not offered, and to refuse it would only make clients nervous.
        nbd.CMD_FLUSH: fua,
    }
    if agreed.allocation:
        flags[nbd.CMD_BLOCK_STATUS] = fua | nbd.CMD_FLAG_REQ_ONE
    if TransmissionFlag.READ_ONLY not in offered:
        flags[nbd.CMD_WRITE] = fua
        flags[nbd.CMD_WRITE_ZEROES] = fua | nbd.CMD_FLAG_NO_HOLE
    if TransmissionFlag.SEND_TRIM in offered:
        flags[nbd.CMD_TRIM] = fua
    return flags
