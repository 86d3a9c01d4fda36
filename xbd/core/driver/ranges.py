"""Ranges of a disk that are being written, and those that nobody else may write meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio


@attrs.define(eq=False)
class _Held:
    start: int
    end: int
    exclusive: bool
    released: trio.Event | None = None
    """Made by the first who waits."""


class RangeLock:
    """Writers share; a read-modify-write has its range alone.  First come, first served.

    A task must not ask for a second range while it holds one.
    """

    def __init__(self) -> None:
        # A dict for its order and its cheap removal; there are as many as requests in flight.
        self._held: dict[_Held, None] = {}
        self._exclusive = 0

    @asynccontextmanager
    async def hold(self, start: int, end: int, *, exclusive: bool) -> AsyncIterator[None]:
        """Own [start, end) of the disk, waiting for all who came before and are in the way."""
        mine = _Held(start, end, exclusive)
        earlier = [
            other
            for other in self._held
            if other.start < end and start < other.end and (exclusive or other.exclusive)
        ]
        self._held[mine] = None
        self._exclusive += exclusive
        try:
            for other in earlier:
                # Those who left while we waited for another are not in the table any more.
                if other in self._held:
                    if other.released is None:
                        other.released = trio.Event()
                    await other.released.wait()
            yield
        finally:
            del self._held[mine]
            self._exclusive -= exclusive
            if mine.released is not None:
                mine.released.set()

    def first_exclusive(self, start: int, end: int) -> int | None:
        """Where in [start, end) an exclusive range begins that is held or waited for."""
        if not self._exclusive:
            return None
        starts = [
            max(held.start, start)
            for held in self._held
            if held.exclusive and held.start < end and start < held.end
        ]
        return min(starts, default=None)
