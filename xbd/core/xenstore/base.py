"""Boundary B: a tree of small strings with watches and transactions.

Paths are absolute (``/local/domain/0/backend/vbd/1/51712``) or, where XenStore resolves them,
relative to the connection's own domain.  Values are ``str``: bytes that are not UTF-8 come back
through ``surrogateescape``, so hostile values can be looked at, compared and written back.
"""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

T = TypeVar("T")


class StoreReader(abc.ABC):
    """What can be done to the tree, inside a transaction or outside."""

    @abc.abstractmethod
    async def read(self, path: str) -> str | None:
        """The value at `path`; None if there is no such node."""

    async def read_all(self, paths: Sequence[str]) -> list[str | None]:
        """As `read`, of several nodes; without waiting for each one's answer where that goes."""
        return [await self.read(path) for path in paths]

    @abc.abstractmethod
    async def directory(self, path: str) -> list[str] | None:
        """Names of the children of `path`, sorted; None if there is no such node."""

    @abc.abstractmethod
    async def write(self, path: str, value: str) -> None:
        """Set the value, making the node and its parents where needed."""

    async def write_all(self, values: Mapping[str, str]) -> None:
        """As `write`, by path, in order; without waiting for each one's answer where that goes."""
        for path, value in values.items():
            await self.write(path, value)

    @abc.abstractmethod
    async def mkdir(self, path: str) -> None:
        """Make an empty node (and its parents) unless it exists."""

    @abc.abstractmethod
    async def remove(self, path: str) -> None:
        """Remove the node and all below it; nothing happens if it does not exist."""

    @abc.abstractmethod
    async def get_permissions(self, path: str) -> list[str] | None:
        """Permissions as the wire has them (``n0``, ``r7``; the first is the owner's)."""

    @abc.abstractmethod
    async def set_permissions(self, path: str, permissions: Sequence[str]) -> None:
        """Replace the permissions."""


class Watch(abc.ABC):
    """A standing watch on a subtree.

    Events are coalesced: a flood of changes costs memory for each distinct path only, up to a
    bound; past that bound, and after a reconnection to XenStore, the watched path itself is
    reported, which means "anything below may have changed".
    """

    path: str

    @abc.abstractmethod
    async def changed(self) -> list[str]:
        """Wait for changes; the distinct paths that changed since the last call, in order.

        The first call returns at once with the watched path itself: whoever watches also looks.
        Raises `StoreLost` only after the store was closed for good.
        """


class Store(StoreReader):
    """A connection to XenStore.

    Calls raise `StoreError` when XenStore refuses (EACCES, EINVAL, EQUOTA...).  A connection that
    breaks is noticed at once; calls in progress raise `StoreLost`, later calls wait for the
    reconnection, watches are set again and report their path.
    """

    @abc.abstractmethod
    def watch(self, path: str) -> AbstractAsyncContextManager[Watch]:
        """Watch `path` and everything below it (``@introduceDomain``, ``@releaseDomain`` too)."""

    @abc.abstractmethod
    def listen(self, path: str, changed: Callable[[], None]) -> AbstractAsyncContextManager[object]:
        """As `watch`, for those who wait for other things, too: `changed` is called soon after
        something changed, and must not raise.  The end of the store is not told."""

    @abc.abstractmethod
    async def transact(self, body: Callable[[StoreReader], Awaitable[T]]) -> T:
        """Run `body` in a transaction; again from the start each time XenStore says EAGAIN.

        Bounded: raises `StoreError` (EAGAIN) after many attempts.  An exception from `body`
        aborts the transaction and goes on to the caller.
        """

    @abc.abstractmethod
    async def domain_path(self, domid: int) -> str:
        """``/local/domain/<domid>``, as XenStore names it."""

    @property
    @abc.abstractmethod
    def generation(self) -> int:
        """How often a connection was made; grows by one with each reconnection."""
