"""Writes to what lies nowhere yet: the driver finds places for all that wait at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import attrs
import trio

from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.api import Extent
from xbd.core.errors import DriverError

WriteT = TypeVar("WriteT")


@attrs.define(eq=False)
class Places(Generic[WriteT]):
    """Of one ring or connection."""

    access: DeviceAccess
    placed: Callable[[Sequence[WriteT]], None]
    """Called with writes for which a place was sought; `resolve` says whether there is one."""
    _waiting: list[tuple[Extent, WriteT]] = attrs.field(factory=list, init=False)
    _seeking: bool = attrs.field(default=False, init=False)

    def seek(self, nursery: trio.Nursery, write: WriteT, offset: int, length: int) -> bool:
        """Have `placed` called with this write, later; False if that would be in vain."""
        if not self.access.can_place(offset, length):
            return False
        if not self._waiting and not self._seeking:
            nursery.start_soon(self._seek)
        self._waiting.append((Extent(offset=offset, length=length), write))
        return True

    async def refill(self) -> None:
        """The driver's `Claims` run out of places."""
        with suppress(DriverError):  # writing says what is wrong
            await self.access.place(())

    async def _seek(self) -> None:
        self._seeking = True
        try:
            while waiting := self._waiting:
                self._waiting = []
                with suppress(DriverError):  # writing says what is wrong
                    await self.access.place([extent for extent, _ in waiting])
                self.placed([write for _, write in waiting])
        finally:
            self._seeking = False
