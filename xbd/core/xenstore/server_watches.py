"""The watches of all of an XenStore's clients, found by the path that changed.  Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs

from xbd.core.xenstore.operations import Change
from xbd.core.xenstore.permissions import Access, Identity
from xbd.core.xenstore.tree import parent_of


@attrs.frozen(slots=True, eq=False)
class ServerWatch:
    """One client's standing request."""

    who: Identity
    path: str
    token: bytes
    prefix_length: int
    """Characters to leave out of reported paths: those in front of a relative path."""
    report: Callable[[bytes, bytes], Any]
    """Called with path and token; must not block."""

    def fire(self, path: str) -> None:
        self.report(path[self.prefix_length :].encode(), self.token)


class WatchTable:
    """Costs a change its path's depth, however many watches there are elsewhere."""

    def __init__(self) -> None:
        self._at: dict[str, dict[ServerWatch, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._at.values()))

    def add(self, watch: ServerWatch) -> None:
        self._at.setdefault(watch.path, {})[watch] = None

    def discard(self, watch: ServerWatch) -> None:
        watches = self._at.get(watch.path, {})
        watches.pop(watch, None)
        if not watches:
            self._at.pop(watch.path, None)

    def fire(self, changes: Iterable[Change]) -> None:
        """Tell every client that watches and may know."""
        for change in changes:
            for watch in [*self._hearing(change)]:
                if any(watch.who.may(Access.READ, entry) for entry in change.readable):
                    watch.fire(change.path)

    def _hearing(self, change: Change) -> Iterator[ServerWatch]:
        path = change.path
        yield from self._at.get(path, ())
        if change.exact or not path.startswith("/"):
            return
        while path != "/":
            path = parent_of(path)
            yield from self._at.get(path, ())
