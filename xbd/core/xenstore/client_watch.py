"""A client's watch: events come in at any rate, memory stays bounded."""

from __future__ import annotations

from typing import Final

import trio

from xbd.core.errors import StoreLost
from xbd.core.xenstore.base import Watch

_DISTINCT_PATHS: Final = 64


class ClientWatch(Watch):
    """Keeps distinct paths up to a bound, beyond which only that something changed (XSA-349)."""

    def __init__(self, path: str, token: bytes) -> None:
        self.path = path
        self.token = token
        self.generation = 0
        """Of the connection on which it is set."""
        self._paths: dict[str, None] = {}
        self._everything = False
        self._end: StoreLost | None = None
        self._bell = trio.lowlevel.ParkingLot()

    def notify(self, path: str) -> None:
        """`path` changed."""
        if self._everything:
            return
        self._paths[path] = None
        if len(self._paths) > _DISTINCT_PATHS:
            self.notify_everything()
        self._bell.unpark_all()

    def notify_everything(self) -> None:
        """Anything may have changed."""
        self._paths = {self.path: None}
        self._everything = True
        self._bell.unpark_all()

    def end(self, reason: StoreLost) -> None:
        """There will be no events any more."""
        self._end = reason
        self._bell.unpark_all()

    @property
    def pending(self) -> bool:
        """Whether there is something to report."""
        return bool(self._paths)

    async def wait(self) -> None:
        """Until there is something to report; it stays."""
        await trio.lowlevel.checkpoint()
        while not self._paths:
            if self._end is not None:
                raise StoreLost(str(self._end))
            await self._bell.park()

    async def changed(self) -> list[str]:
        await self.wait()
        paths, self._paths, self._everything = [*self._paths], {}, False
        return paths
