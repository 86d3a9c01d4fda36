"""Waits for all sockets and the engine at once.

A wake-up through trio costs several times what a small request does.  So there is one for all
that is ready, and what becomes ready meanwhile is found without another one.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from typing import Final

import trio

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE

_TURN_SECONDS: Final = 0.001
"""How long the rest of the process waits at most while there is always something ready."""
_LONG_TURN_SECONDS: Final = 0.02
_LINGER_SECONDS: Final = 0.001

Ready = Callable[[int], None]
"""Told what a file is ready for: `READ`, `WRITE` or both."""


class Poller:
    """Calls back when files are ready.

    `alone`: nothing else in this process is urgent.  Then clients that are active are waited for
    here, for a moment, with all of the process: that spares most wake-ups through trio.
    """

    def __init__(self, *, alone: bool) -> None:
        self.tasks = 0
        """Tasks under way that need trio to go on: nothing is waited for here meanwhile."""
        self._alone = alone
        self._selector = selectors.DefaultSelector()
        self._events: dict[int, int] = {}

    def watch(self, fd: int, events: int, ready: Ready) -> None:
        """Call `ready` when a file is ready for these events; none: don't, from now on.

        To be ended before the file is closed.
        """
        before = self._events.get(fd, 0)
        if before == events:
            return
        if not events:
            self._selector.unregister(fd)
        elif before:
            self._selector.modify(fd, events, ready)
        else:
            self._selector.register(fd, events, ready)
        self._events[fd] = events

    async def run(self) -> None:
        """Call back until cancelled."""
        fd = self._selector.fileno()
        while True:
            await trio.lowlevel.wait_readable(fd)
            begun = time.perf_counter()
            while ready := self._selector.select(_LINGER_SECONDS if self._patient else 0):
                for key, events in ready:
                    key.data(events)
                turn = _LONG_TURN_SECONDS if self._patient else _TURN_SECONDS
                if time.perf_counter() - begun > turn:
                    break

    @property
    def _patient(self) -> bool:
        return self._alone and not self.tasks

    def close(self) -> None:
        """Nothing is watched any more."""
        self._selector.close()
