"""XenStore's client: pyxs's packets over xenstored's socket or the kernel's device, under trio."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import structlog
import trio

from xbd.core.errors import StoreError, StoreLost, StoreUnavailable
from xbd.core.units import Domid
from xbd.core.xenstore.base import Store, StoreReader, Watch
from xbd.core.xenstore.calls import Calls, decode_text, encode_path
from xbd.core.xenstore.client_transaction import attempt_transaction
from xbd.core.xenstore.client_watch import ClientListener, ClientWatch, Standing
from xbd.core.xenstore.link import Link
from xbd.core.xenstore.places import (
    default_store_path,
    is_device,
    open_store,
    unavailable,
)
from xbd.core.xenstore.protocol import NUL, Op

__all__ = ["StoreClient", "default_store_path"]

T = TypeVar("T")
StandingT = TypeVar("StandingT", bound=Standing)
_log = structlog.get_logger(__name__)

ANSWER_WITHIN_S: Final = 10.0
PROBE_AFTER_S: Final = 30.0
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 0.5
_STABLE_S: Final = 1.0
"""A connection that lived shorter does not reset the back-off."""
_INITIAL_EVENT_WITHIN_S: Final = 1.0
_TRANSACTION_ATTEMPTS: Final = 100
_TRANSACTION_LONGEST_PAUSE_S: Final = 0.02
_TRANSACTIONS: Final = 4
"""At the same time; xenstored allows a driver domain ten, its kernel's included."""


class StoreClient(Calls, Store):
    """A `Store` that reconnects by itself."""

    def __init__(
        self,
        path: Path,
        *,
        answer_within_s: float,
        probe_after_s: float,
        patience_s: float | None,
    ) -> None:
        self.path = path
        self._nursery: trio.Nursery
        # Shielded: whoever is cancelled still has something to write down on the way out.
        self._life = trio.CancelScope(shield=True)
        self._alive = trio.Event()
        self._answer_within_s = answer_within_s
        self._probe_after_s = probe_after_s
        self._patience_s = patience_s
        self._link: Link | None = None
        self._generation = 0
        self._closed: StoreLost | None = None
        self._ready = trio.lowlevel.ParkingLot()
        self._watches: dict[bytes, Standing] = {}
        self._last_token = 0
        self._transactions = trio.Semaphore(_TRANSACTIONS)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        path: Path | None = None,
        *,
        answer_within_s: float = ANSWER_WITHIN_S,
        probe_after_s: float = PROBE_AFTER_S,
        patience_s: float | None = None,
    ) -> AsyncIterator[StoreClient]:
        """Connect to the socket or device at `path`, or where this host has XenStore.

        A request not answered within `answer_within_s` (seconds) counts as a broken connection;
        after `probe_after_s` of silence one is made, so that a hang does not go unnoticed.
        After `patience_s` seconds without a connection the store is closed for good; None: never.
        Raises `StoreUnavailable` if there is no XenStore to begin with.
        """
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            store = cls(
                path or default_store_path(),
                answer_within_s=answer_within_s,
                probe_after_s=probe_after_s,
                patience_s=patience_s,
            )
            # Not `nursery.start`: cancelled meanwhile, it would wait for a shielded task for ever.
            nursery.start_soon(store._live)
            try:
                await store._alive.wait()
                store._nursery.start_soon(store._keep_connected, await store._first_link())
                yield store
            except Exception as error:
                # Kept out of the nursery, which would wrap it in a group.
                failure = error
            finally:
                store._close(StoreLost("this XenStore client was closed"))
                store._life.cancel()
        if failure is not None:
            raise failure

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def connected(self) -> bool:
        """Whether requests go through just now, as far as is known."""
        return self._link is not None and not self._link.lost.is_set()

    async def domain_path(self, domid: int) -> str:
        payload = await self._call(Op.GET_DOMAIN_PATH, _number(domid))
        return decode_text(payload.rstrip(NUL))

    async def introduce(self, domid: Domid, frame: int = 1, port: int = 1) -> None:
        """INTRODUCE a domain (domain 0's right); an embedded store ignores the other two."""
        await self._call(Op.INTRODUCE, _number(domid) + _number(frame) + _number(port))

    async def release(self, domid: Domid) -> None:
        """RELEASE a domain (domain 0's right)."""
        await self._call(Op.RELEASE, _number(domid))

    async def is_introduced(self, domid: Domid) -> bool:
        """Whether XenStore knows this domain."""
        return (await self._call(Op.IS_DOMAIN_INTRODUCED, _number(domid))).startswith(b"T")

    @asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[Watch]:
        async with self._standing(ClientWatch(path, self._new_token())) as watch:
            with trio.move_on_after(_INITIAL_EVENT_WITHIN_S):
                await watch.wait()  # XenStore reports the path once up front
            if not watch.pending:
                watch.notify(path)
            yield watch

    def listen(self, path: str, changed: Callable[[], None]) -> AbstractAsyncContextManager[object]:
        return self._standing(ClientListener(path, self._new_token(), changed))

    def _new_token(self) -> bytes:
        self._last_token += 1
        return b"xbd-%d" % self._last_token

    @asynccontextmanager
    async def _standing(self, watch: StandingT) -> AsyncIterator[StandingT]:
        encode_path(watch.path)
        self._watches[watch.token] = watch
        try:
            while watch.generation != self._generation:
                link = await self._connected_link()
                if watch.generation != self._generation:
                    with contextlib.suppress(StoreLost):  # the reconnection sets it again
                        await _set_watch(link, watch, self._generation)
            yield watch
        finally:
            del self._watches[watch.token]
            watch.end(StoreLost("this watch was closed"))
            if self._link is not None:
                self._link.post(Op.UNWATCH, _watch_payload(watch))

    async def transact(self, body: Callable[[StoreReader], Awaitable[T]]) -> T:
        async with self._transactions:
            for attempt in range(_TRANSACTION_ATTEMPTS):
                committed, result = await attempt_transaction(await self._connected_link(), body)
                if committed:
                    return result
                await trio.sleep(min(attempt / 1000, _TRANSACTION_LONGEST_PAUSE_S))
        raise StoreError(
            f"a transaction found no gap in {_TRANSACTION_ATTEMPTS} attempts", errno=errno.EAGAIN
        )

    async def _call(self, op: int, payload: bytes) -> bytes:
        link = await self._connected_link()
        return await link.request(op, payload)

    async def _call_all(self, op: int, payloads: Sequence[bytes]) -> list[bytes | StoreError]:
        link = await self._connected_link()
        return await link.request_all(op, payloads)

    async def _connected_link(self) -> Link:
        while self._link is None or self._link.lost.is_set():
            if self._closed is not None:
                raise StoreLost(str(self._closed))
            await self._ready.park()
        return self._link

    # Connecting

    async def _live(self) -> None:
        with self._life:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._alive.set()
                await trio.sleep_forever()

    async def _first_link(self) -> Link:
        try:
            return await self._new_link()
        except OSError as error:
            raise unavailable(self.path, error) from error
        except (StoreError, StoreLost) as error:
            raise StoreUnavailable(
                f"what answers at {self.path} is not a working XenStore: {error}"
            ) from error

    async def _new_link(self) -> Link:
        """Connect, see that it answers, set the watches.

        Raises `OSError`, `StoreError`, `StoreLost`.
        """
        link = Link(
            open_store(self.path),
            answer_within_s=self._answer_within_s,
            probe_after_s=self._probe_after_s,
            one_at_a_time=is_device(self.path),
        )
        self._nursery.start_soon(link.run)
        generation = self._generation + 1
        try:
            await link.request(Op.GET_DOMAIN_PATH, _number(0))
            watches = [*self._watches.values()]
            for watch in watches:
                await _set_watch(link, watch, generation)
        except BaseException:
            link.lose("it did not answer as XenStore does")
            raise
        if link.lost.is_set():
            raise StoreLost(link.reason)
        self._generation = generation
        self._link = link
        link.on_event = self._on_event
        for watch in watches:
            if watch.token in self._watches:
                watch.notify_everything()
            else:  # given up meanwhile
                link.post(Op.UNWATCH, _watch_payload(watch))
        self._ready.unpark_all()
        return link

    async def _keep_connected(self, link: Link) -> None:
        pause_s = 0.0
        while True:
            since = trio.current_time()
            await link.lost.wait()
            if self._closed is not None:
                return
            _log.warning("xenstore-lost", path=str(self.path), reason=link.reason)
            now = trio.current_time()
            if now - since >= _STABLE_S:
                pause_s = 0.0
            deadline = now + (float("inf") if self._patience_s is None else self._patience_s)
            with trio.CancelScope(deadline=deadline):
                link, pause_s = await self._reconnect(pause_s)
                continue
            self._close(StoreLost(f"XenStore did not come back within {self._patience_s:g} s"))
            return

    async def _reconnect(self, pause_s: float) -> tuple[Link, float]:
        """The new link, and how long to pause if that one is lost at once again."""
        while True:
            await trio.sleep(pause_s)
            pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            try:
                link = await self._new_link()
            except (OSError, StoreError, StoreLost) as error:
                _log.debug("xenstore-still-lost", path=str(self.path), reason=str(error))
            else:
                _log.info("xenstore-back", path=str(self.path), generation=self._generation)
                return link, pause_s

    def _close(self, reason: StoreLost) -> None:
        self._closed = self._closed or reason
        if self._link is not None:
            self._link.lose(str(self._closed))
        for watch in self._watches.values():
            watch.end(self._closed)
        self._ready.unpark_all()

    def _on_event(self, path: bytes, token: bytes) -> None:
        watch = self._watches.get(token)
        if watch is not None:  # otherwise it was just given up: an ordinary race
            watch.notify(decode_text(path))


async def _set_watch(link: Link, watch: Standing, generation: int) -> None:
    await link.request(Op.WATCH, _watch_payload(watch))
    watch.generation = generation


def _watch_payload(watch: Standing) -> bytes:
    return encode_path(watch.path) + watch.token + NUL


def _number(number: int) -> bytes:
    return str(number).encode() + NUL
