"""A device's directory in XenStore: everything that is written there, each thing in a transaction.

Two rules hold for all of it.  A directory that the toolstack has removed is never made again.
A state that the toolstack has written meanwhile is never overwritten: whoever finds another state
than expected writes nothing and looks again.
"""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

from xbd.core.backend.failure import (
    ERROR_KEY,
    NBD_KEY,
    STATUS_KEY,
    clear_error_node,
    for_store,
    write_error_node,
)
from xbd.core.backend.identity import DeviceId
from xbd.core.backend.keys import (
    OwnKeys,
    parse_state,
    read_again,
    read_frontend,
    read_frontend_state,
    read_own,
)
from xbd.core.backend.publish import offer, size_keys
from xbd.core.blkif.state import XenbusState
from xbd.core.datapath import Disk, Features, FrontendConfig
from xbd.core.driver import Geometry
from xbd.core.errors import StoreError
from xbd.core.xenstore.base import Store, StoreReader

Body = Callable[[StoreReader], Awaitable[None]]


class Node:
    """One backend directory."""

    def __init__(self, store: Store, base: str, device: DeviceId) -> None:
        self._store = store
        self._base = base
        self.device = device
        self.path = device.path(base)
        self.own: OwnKeys | None = None
        """As `read` saw it last; for listings."""
        self.theirs: XenbusState | None = None
        """As `frontend_state` saw it last; for listings."""

    async def read(self) -> OwnKeys | None:
        """None: the directory is gone."""
        self.own = await read_own(self._store, self.path)
        return self.own

    async def look_again(self) -> OwnKeys | None:
        """As `read`, of what may have changed since then."""
        if self.own is None:
            return await self.read()
        self.own = await read_again(self._store, self.path, self.own)
        return self.own

    async def frontend_state(self, own: OwnKeys) -> XenbusState | None:
        """Unknown: the frontend's directory is gone.  None: what is there means nothing."""
        self.theirs = await read_frontend_state(self._store, own.frontend)
        return self.theirs

    async def read_frontend(self, own: OwnKeys, *, features: Features) -> FrontendConfig:
        """What the frontend chose; raises `BadNegotiation`."""
        return await read_frontend(
            self._store,
            own.frontend,
            domid=self.device.domid,
            features=features,
            machine=platform.machine(),
        )

    def listen_to_frontend(
        self, own: OwnKeys, changed: Callable[[], None]
    ) -> AbstractAsyncContextManager[object]:
        """Only its state: a guest may write whatever else it likes, as often as it likes."""
        return self._store.listen(f"{own.frontend}/state", changed)

    async def _change(self, expected: XenbusState, body: Body) -> bool:
        async def guarded(tree: StoreReader) -> bool:
            text = await tree.read(f"{self.path}/state")
            if text is None or (parse_state(text) or XenbusState.UNKNOWN) is not expected:
                return False
            await body(tree)
            return True

        return await self._store.transact(guarded)

    async def _write_state(self, tree: StoreReader, state: XenbusState) -> None:
        await tree.write(f"{self.path}/state", str(int(state)))

    async def switch(self, expected: XenbusState, new: XenbusState) -> bool:
        """Write our state; False: the toolstack was faster."""
        if new is expected:
            return True
        return await self._write(expected, new)

    async def repeat(self, state: XenbusState) -> bool:
        """Write the state that is there once more, so that the guest's watch fires."""
        return await self._write(state, state)

    async def _write(self, expected: XenbusState, new: XenbusState) -> bool:
        async def body(tree: StoreReader) -> None:
            await self._write_state(tree, new)

        return await self._change(expected, body)

    async def is_hvm(self) -> bool:
        """Whether the guest is an HVM domain; only known in the toolstack's own domain."""
        try:
            return await self._store.read(f"/libxl/{self.device.domid}/type") == "hvm"
        except StoreError:
            return False

    async def publish(
        self, own: OwnKeys, disk: Disk, state: XenbusState, *, nbd: Path | None = None
    ) -> bool:
        """Geometry, features and xbd-status, and then the state (InitWait).

        `nbd`: the socket for QEMU, if there is one.
        """
        keys = offer(disk.access.geometry, disk.features, own, read_only=disk.read_only)
        texts = {name: str(value) for name, value in keys.items()}
        texts[STATUS_KEY] = "open"
        if nbd is not None:
            texts[NBD_KEY] = str(nbd)

        async def body(tree: StoreReader) -> None:
            await tree.write_all({f"{self.path}/{name}": text for name, text in texts.items()})
            await tree.remove(f"{self.path}/{ERROR_KEY}")
            await clear_error_node(tree, self.device, self._base)
            await self._write_state(tree, state)

        return await self._change(own.state, body)

    async def announce_size(self, geometry: Geometry) -> None:
        """The size that a resize has left.

        A connected frontend looks at it when our state is written again (blkif.h, 'resize'); one
        that is yet to connect reads it then.
        """
        announced = False
        while not announced and (own := await self.read()) is not None:
            write = partial(self._write_size, own.state, geometry)
            announced = await self._change(own.state, write)

    async def _write_size(self, state: XenbusState, geometry: Geometry, tree: StoreReader) -> None:
        for name, value in size_keys(geometry).items():
            await tree.write(f"{self.path}/{name}", str(value))
        if state is XenbusState.CONNECTED:
            await self._write_state(tree, state)

    async def fail(self, expected: XenbusState, error: BaseException, state: XenbusState) -> bool:
        """Say why the disk can't be served: xbd-status, xbd-error, the error node; then the state.

        Where the disk could not be opened the state is InitWait all the same: libxl waits for it,
        and then runs the hotplug script, which finds xbd-status and lets the attach fail with
        xbd-error as the reason.
        """

        async def body(tree: StoreReader) -> None:
            await tree.write(f"{self.path}/{STATUS_KEY}", "error")
            await tree.write(f"{self.path}/{ERROR_KEY}", for_store(error))
            await write_error_node(tree, self.device, self._base, error)
            await self._write_state(tree, state)

        return await self._change(expected, body)

    async def forget(self) -> None:
        """The directory is gone: nobody looks for its error any more."""

        async def body(tree: StoreReader) -> None:
            await clear_error_node(tree, self.device, self._base)

        await self._store.transact(body)
