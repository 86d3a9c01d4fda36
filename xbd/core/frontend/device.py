"""A frontend: negotiates with a backend over XenStore and reads and writes its disk.

The guest's side of blkif.h, in user space, for the embedded host: the demo, the tests and
anything else that wants to use a disk as a guest would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from xbd.core.blkif import XenbusState, constants
from xbd.core.frontend.errors import FrontendError
from xbd.core.frontend.options import FrontendOptions
from xbd.core.frontend.requests import DiskRequests
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import Domid
from xbd.core.xenstore import Store, StoreReader

CONNECT_SECONDS = 60.0
"""How long the backend may take for each step."""


@attrs.frozen(kw_only=True)
class Offer:
    """What the backend advertised, as far as this frontend understands it."""

    size: int
    """Bytes."""
    sector_size: int
    info: int
    flush: bool
    barrier: bool
    discard: bool
    discard_secure: bool
    persistent: bool
    indirect_segments: int
    ring_order: int
    queues: int

    @property
    def read_only(self) -> bool:
        return bool(self.info & constants.VDISK_READONLY)


class BlockFrontend(DiskRequests):
    """A connected disk.  Made by `connect`."""

    def __init__(
        self, store: Store, guest: GuestDomain, devid: int, options: FrontendOptions
    ) -> None:
        super().__init__(guest, options)
        self.devid = devid
        self.path = f"/local/domain/{guest.domid}/device/vbd/{devid}"
        self.backend_path = ""
        self.offer: Offer
        self._store = store

    async def negotiate(self) -> None:
        """From Initialising to Connected.  Raises `FrontendError`."""
        backend = await self._store.read(f"{self.path}/backend")
        backend_id = await self._store.read(f"{self.path}/backend-id")
        if backend is None or backend_id is None:
            raise FrontendError(f"{self.path} names no backend: is the disk attached?")
        self.backend_path = backend
        self.backend = Domid(int(backend_id))
        await self.wait_backend(XenbusState.INIT_WAIT, XenbusState.CONNECTED)
        await self.publish()
        await self.wait_backend(XenbusState.CONNECTED)
        self.offer = await self._read_offer()
        self.make_data_pages(self.offer.indirect_segments)
        await self.set_state(XenbusState.CONNECTED)

    async def publish(self) -> None:
        """Make rings and ports and tell the backend about them; our state becomes Initialised."""
        offer = await self._read_offer()
        options = self.options
        order = min(options.ring_order, offer.ring_order)
        count = max(1, min(options.queues, offer.queues))
        self.persistent = options.persistent and offer.persistent
        await self.make_queues(count, order)

        async def write(transaction: StoreReader) -> None:
            await self._write_keys(transaction, order)

        await self._store.transact(write)

    async def _write_keys(self, store: StoreReader, order: int) -> None:
        options = self.options
        several = len(self.queues) > 1
        if several:
            await store.write(f"{self.path}/multi-queue-num-queues", str(len(self.queues)))
        if order:
            key = "num-ring-pages" if options.legacy_ring_key else "ring-page-order"
            value = 1 << order if options.legacy_ring_key else order
            await store.write(f"{self.path}/{key}", str(value))
        for number, queue in enumerate(self.queues):
            base = f"{self.path}/queue-{number}" if several else self.path
            for index, ref in enumerate(queue.refs):
                name = f"ring-ref{index}" if order else "ring-ref"
                await store.write(f"{base}/{name}", str(ref))
            await store.write(f"{base}/event-channel", str(queue.port.port))
        if options.write_protocol:
            await store.write(f"{self.path}/protocol", options.abi.protocol)
        await store.write(f"{self.path}/feature-persistent", str(int(self.persistent)))
        await store.write(f"{self.path}/state", str(int(XenbusState.INITIALISED)))

    async def _read_offer(self) -> Offer:
        async def number(name: str, default: int = 0) -> int:
            text = await self._store.read(f"{self.backend_path}/{name}")
            return int(text) if text is not None else default

        return Offer(
            size=await number("sectors") * constants.SECTOR,
            sector_size=await number("sector-size", constants.SECTOR),
            info=await number("info"),
            flush=bool(await number("feature-flush-cache")),
            barrier=bool(await number("feature-barrier")),
            discard=bool(await number("feature-discard")),
            discard_secure=bool(await number("discard-secure")),
            persistent=bool(await number("feature-persistent")),
            indirect_segments=await number("feature-max-indirect-segments"),
            ring_order=await number("max-ring-page-order"),
            queues=await number("multi-queue-max-queues", 1),
        )

    async def backend_state(self) -> XenbusState:
        """The backend's state; Unknown when its directory is gone."""
        text = await self._store.read(f"{self.backend_path}/state")
        return XenbusState(int(text)) if text else XenbusState.UNKNOWN

    async def wait_backend(self, *states: XenbusState) -> XenbusState:
        """Wait until the backend is in one of these states.

        Raises `FrontendError` when it goes away instead, or after `CONNECT_SECONDS`.
        """
        final = {XenbusState.UNKNOWN, XenbusState.CLOSING, XenbusState.CLOSED} - set(states)
        with trio.move_on_after(CONNECT_SECONDS):
            async with self._store.watch(f"{self.backend_path}/state") as watch:
                while True:
                    await watch.changed()
                    state = await self.backend_state()
                    if state in states:
                        return state
                    if state in final:
                        raise FrontendError(await self._why(state))
        names = " or ".join(state.name for state in states)
        raise FrontendError(f"{self.backend_path} did not reach {names} in {CONNECT_SECONDS:g} s")

    async def _why(self, state: XenbusState) -> str:
        for key in ("hotplug-error", "xbd-error"):
            reason = await self._store.read(f"{self.backend_path}/{key}")
            if reason:
                return f"the backend refuses: {reason}"
        return f"the backend is {state.name}"

    async def set_state(self, state: XenbusState) -> None:
        """Tell the backend our state."""
        await self._store.write(f"{self.path}/state", str(int(state)))

    async def close(self) -> None:
        """Disconnect as a driver does: Closing, then Closed when the backend followed."""
        await self.set_state(XenbusState.CLOSING)
        gone = (XenbusState.CLOSING, XenbusState.CLOSED, XenbusState.UNKNOWN)
        await self.wait_backend(*gone)
        self.release()
        if await self._store.read(f"{self.path}/state") is not None:
            await self.set_state(XenbusState.CLOSED)


@asynccontextmanager
async def connect(
    store: Store,
    guest: GuestDomain,
    devid: int,
    options: FrontendOptions | None = None,
) -> AsyncIterator[BlockFrontend]:
    """Connect to an attached disk; disconnects on the way out.  Raises `FrontendError`."""
    frontend = BlockFrontend(store, guest, devid, options or FrontendOptions())
    try:
        await frontend.negotiate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(frontend.run_queues)
            yield frontend
            nursery.cancel_scope.cancel()
        await frontend.close()
    finally:
        frontend.release()
