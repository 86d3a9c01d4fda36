"""Requests on their way from one client.

NBD protocol document, section "Request message".
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from xbd.core.nbd import constants as nbd
from xbd.core.nbd.errors import BadClient
from xbd.core.units import KIB

REQUEST: Final = struct.Struct(">IHHQQI")
"""Magic, command flags, type, cookie, offset, length."""

_BYTES: Final = 256 * KIB
_SHORT: Final = 16 * KIB
"""Data that is as well copied once more."""


class Inbox:
    """Takes apart what has arrived; the data of long writes goes straight to its place."""

    def __init__(self, received: bytes) -> None:
        """`received`: what has arrived already, at most some KiB."""
        self._memory = memoryview(bytearray(_BYTES))
        self._memory[: len(received)] = received
        self._start = 0
        self._end = len(received)
        """What of it was not taken yet."""
        self._missing: memoryview | None = None
        """Where the rest of a write's data goes that is still arriving."""
        self._skip = 0
        """Data that nobody wants and that is still to come."""

    def receive(self, sock: socket.socket) -> bool:
        """Take what there is; False: nothing will come any more."""
        rest = self._memory[self._end :]
        missing = self._missing
        try:
            if missing is None:
                got = sock.recv_into(rest)
                self._end += got
            else:
                if len(missing) > _SHORT:
                    # Mostly another long write follows: leave its data where it is until there
                    # is a place for it.
                    rest = rest[:_SHORT]
                got = sock.recvmsg_into((missing, rest))[0]
                arrived = min(got, len(missing))
                self._missing = missing[arrived:] or None
                self._end += got - arrived
        except BlockingIOError:
            return True
        except OSError:
            return False
        return got > 0

    @property
    def complete(self) -> bool:
        """Whether the data that `fetch` was asked for last is all there."""
        return self._missing is None

    def peek(self) -> tuple[int, int, int, int, int] | None:
        """The next request's flags, type, cookie, offset and length; None: not all there yet.

        Raises `BadClient` if there is something else.
        """
        if self._skip:
            skipped = min(self._skip, self._end - self._start)
            self._skip -= skipped
            self._start += skipped
        if self._end - self._start < REQUEST.size:
            return None
        magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(self._memory, self._start)
        if magic != nbd.REQUEST_MAGIC:
            raise BadClient("a request has the wrong magic number")
        return flags, kind, cookie, offset, length

    def advance(self) -> None:
        """The request that `peek` gave is taken; its data, if any, follows."""
        self._start += REQUEST.size

    def skip(self, length: int) -> None:
        """Nobody wants the data."""
        self._skip = length

    def fetch(self, place: memoryview) -> bool:
        """Put the data into `place`; False: only what is there, and the rest as it arrives."""
        here = min(len(place), self._end - self._start)
        place[:here] = self._memory[self._start : self._start + here]
        self._start += here
        self._missing = place[here:] or None
        return self._missing is None

    def compact(self) -> None:
        """Make room at the end; what is left is less than a request."""
        left = self._end - self._start
        self._memory[:left] = self._memory[self._start : self._end]
        self._start, self._end = 0, left
