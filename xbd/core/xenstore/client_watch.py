"""A client's watches: events come in at any rate, memory stays bounded."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Final

import attrs
import trio

from xbd.core.errors import StoreLost
from xbd.core.xenstore.base import Watch

_DISTINCT_PATHS: Final = 64


@attrs.define(eq=False)
class Standing(abc.ABC):
    """What XenStore knows by a token."""

    path: str
    token: bytes
    generation: int = attrs.field(default=0, init=False)
    """Of the connection on which it is set."""

    @abc.abstractmethod
    def notify(self, path: str) -> None:
        """`path` changed."""

    @abc.abstractmethod
    def notify_everything(self) -> None:
        """Anything may have changed."""

    @abc.abstractmethod
    def end(self, reason: StoreLost) -> None:
        """There will be no events any more."""


@attrs.define(eq=False)
class ClientListener(Standing):
    """Calls somebody for each event: it is for them to make light of a flood."""

    changed: Callable[[], None]

    def notify(self, path: str) -> None:
        self.changed()

    def notify_everything(self) -> None:
        self.changed()

    def end(self, reason: StoreLost) -> None:
        """Nobody waits for it."""


class ClientWatch(Standing, Watch):
    """Keeps distinct paths up to a bound, beyond which only that something changed (XSA-349)."""

    def __init__(self, path: str, token: bytes) -> None:
        super().__init__(path, token)
        self._paths: dict[str, None] = {}
        self._everything = False
        self._end: StoreLost | None = None
        self._bell = trio.lowlevel.ParkingLot()

    def notify(self, path: str) -> None:
        if self._everything:
            return
        self._paths[path] = None
        if len(self._paths) > _DISTINCT_PATHS:
            self.notify_everything()
        self._bell.unpark_all()

    def notify_everything(self) -> None:
        self._paths = {self.path: None}
        self._everything = True
        self._bell.unpark_all()

    def end(self, reason: StoreLost) -> None:
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
