"""Waking a device: any number of rings before it looks count as one."""

from __future__ import annotations

import trio


class Bell:
    """A flag that one task waits for and many set.  Rung when new: who waits first also looks."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._event.set()

    def ring(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        """Until rung since the last return."""
        await self._event.wait()
        self._event = trio.Event()

    def take(self) -> bool:
        """Whether it was rung since, without waiting."""
        rung = self._event.is_set()
        if rung:
            self._event = trio.Event()
        return rung
