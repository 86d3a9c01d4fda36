"""Waking a device, in a way that a guest can't make expensive."""

from __future__ import annotations

from typing import Final

import attrs
import trio

_FREE_LOOKS: Final = 64
_LOOK_PAUSE_SECONDS: Final = 0.02


@attrs.define(eq=False)
class Pace:
    """Lets `free` passes through at once, and then one every `pause_seconds`."""

    free: int
    pause_seconds: float
    _left: float = attrs.field(init=False)
    _last: float = attrs.field(factory=trio.current_time, init=False)

    def __attrs_post_init__(self) -> None:
        self._left = self.free

    async def wait(self) -> None:
        now = trio.current_time()
        refill = (now - self._last) / self.pause_seconds
        self._left = min(self.free, self._left + refill) - 1
        self._last = now
        if self._left < 0:
            await trio.sleep(-self._left * self.pause_seconds)


class Bell:
    """A flag that one task waits for and many set: any number of rings is one look.

    Rung when new: who waits first also looks.  Whoever rings all the time is answered more slowly.
    """

    def __init__(self) -> None:
        self._event = trio.Event()
        self._event.set()
        self._pace = Pace(_FREE_LOOKS, _LOOK_PAUSE_SECONDS)
        self.stopping = False
        """Whether it was rung because the daemon stops."""

    def ring_for_stop(self) -> None:
        """The daemon stops."""
        self.stopping = True
        self.ring()

    def ring(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        """Until rung since the last return."""
        await self._event.wait()
        await self._pace.wait()
        self._event = trio.Event()

    def take(self) -> bool:
        """Whether it was rung since, without waiting."""
        rung = self._event.is_set()
        if rung:
            self._event = trio.Event()
        return rung
