"""Where guests are: under Xen, or other processes in an embedded host's directory."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import structlog
import trio

from xbd.config import Config
from xbd.core.errors import StoreError, StoreLost, StoreUnavailable
from xbd.core.hypervisor import Hypervisor
from xbd.core.hypervisor.embedded import EmbeddedHost
from xbd.core.units import Domid
from xbd.core.xenstore.base import Store
from xbd.core.xenstore.client import StoreClient, default_store_path
from xbd.core.xenstore.server import EmbeddedXenStore

_log = structlog.get_logger("xbd.daemon")


class LostGuests:
    """Domains to bury.  One that dies again before that is buried once: guests come and go as
    often as they like, and this must not grow with it."""

    def __init__(self) -> None:
        self._domids: dict[Domid, None] = {}
        self._some = trio.Event()

    def add(self, domid: Domid) -> None:
        self._domids[domid] = None
        self._some.set()

    async def next(self) -> Domid:
        """Wait for one, and take it."""
        await self._some.wait()
        domid = next(iter(self._domids))
        del self._domids[domid]
        if not self._domids:
            self._some = trio.Event()
        return domid


@attrs.frozen(kw_only=True)
class Host:
    """Where guests are."""

    store: StoreClient
    hypervisor: Hypervisor
    lost: LostGuests | None = None
    """Guests whose process has ended; None where a toolstack takes care of that."""


@asynccontextmanager
async def xen_host(config: Config) -> AsyncIterator[Host]:
    """This domain under Xen."""
    from xbd.core.hypervisor.xen import XenHypervisor

    path = config.store.path or default_store_path()
    async with StoreClient.connect(path) as store:
        hypervisor = XenHypervisor()
        try:
            yield Host(store=store, hypervisor=hypervisor)
        finally:
            hypervisor.close()


@asynccontextmanager
async def embedded_host(directory: Path) -> AsyncIterator[Host]:
    """Processes as guests; a XenStore of our own unless one answers already."""
    lost = LostGuests()
    async with AsyncExitStack() as stack:
        opening = EmbeddedHost.open(directory, on_guest_lost=lost.add)
        host = await stack.enter_async_context(opening)
        store = await stack.enter_async_context(_embedded_store(directory))
        yield Host(store=store, hypervisor=host.hypervisor, lost=lost)


@asynccontextmanager
async def _embedded_store(directory: Path) -> AsyncIterator[StoreClient]:
    """The XenStore in `directory`: whoever serves it already, or else a new one."""
    path = directory / "xenstored.socket"
    async with AsyncExitStack() as stack:
        if not await _answers(path):
            await stack.enter_async_context(EmbeddedXenStore.serve(directory))
        yield await stack.enter_async_context(StoreClient.connect(path))


async def _answers(path: Path) -> bool:
    try:
        stream = await trio.open_unix_socket(path)
    except OSError:
        return False
    await stream.aclose()
    return True


async def own_directory(store: Store, domid: int | None) -> str:
    """This domain's directory in XenStore; raises `StoreUnavailable` if it can't be told."""
    try:
        if domid is None:
            text = await store.read("domid")
            domid = int(text) if text is not None and text.isdigit() else 0
        return await store.domain_path(domid)
    except StoreError as error:
        raise StoreUnavailable(f"cannot read this domain's number from XenStore: {error}") from None


async def bury_guests(lost: LostGuests, store: StoreClient, base: str, kinds: list[str]) -> None:
    """On the embedded host there is no toolstack to clean up after a guest that died."""
    while True:
        domid = await lost.next()
        try:
            await _bury(domid, store, base, kinds)
        except StoreLost:
            lost.add(domid)  # calls wait until the store is back


async def _bury(domid: Domid, store: StoreClient, base: str, kinds: list[str]) -> None:
    try:
        await store.release(domid)
    except StoreError as error:
        if error.errno != errno.ENOENT:
            _log.warning(f"cannot release domain {domid}: {error}")
    guest = await store.domain_path(domid)
    for path in (*(f"{base}/backend/{kind}/{domid}" for kind in kinds), guest):
        try:
            await store.remove(path)
        except StoreError as error:
            _log.warning(f"cannot remove {path}: {error}")
