"""The embedded host's toolstack: makes domains and attaches disks as xl and libxl do.

It writes the XenStore nodes that libxl writes (tools/libs/light/libxl_disk.c), waits for the
backend as libxl does (state 2, for equality, 10 seconds), and then does what the hotplug script
block-xbd does: it looks whether the disk was opened and tells the backend to go on.
"""

from __future__ import annotations

import uuid
from contextlib import suppress

import attrs
import trio

from xbd.core.blkif import XenbusState
from xbd.core.errors import ConfigError, StoreError
from xbd.core.units import Domid
from xbd.core.xenstore import StoreReader
from xbd.core.xenstore.client import StoreClient

INIT_SECONDS = 10.0
"""LIBXL_INIT_TIMEOUT: from attaching to state 2."""
DESTROY_SECONDS = 10.0
"""LIBXL_DESTROY_TIMEOUT: from detaching to state 6."""
FIRST_DEVID = 51712
"""xvda; the following disks are 16 apart."""


class AttachFailed(ConfigError):
    """The backend could not open the disk, or did not answer."""

    exit_code = 1


@attrs.frozen(kw_only=True)
class DiskLine:
    """One disk of a guest, as an xl disk line has it."""

    target: str
    """``DRIVER:PATH[?option=value&...]``."""
    number: int = 0
    """0: xvda, 1: xvdb."""
    read_only: bool = False
    kind: str = "vbd3"
    discard_enable: bool | None = None

    @property
    def devid(self) -> int:
        return FIRST_DEVID + 16 * self.number

    @property
    def vdev(self) -> str:
        return f"xvd{chr(ord('a') + self.number)}"


class Toolstack:
    """Acts with the rights of domain 0 on the store of an embedded host."""

    def __init__(self, store: StoreClient) -> None:
        self._store = store

    async def create_domain(self, domid: Domid, name: str) -> None:
        """Make a domain known to XenStore; its own socket appears."""
        path = f"/local/domain/{domid}"

        async def write(store: StoreReader) -> None:
            await store.remove(path)
            await store.mkdir(path)
            await store.set_permissions(path, ["n0", f"r{domid}"])
            await store.write(f"{path}/name", name)
            await store.write(f"{path}/domid", str(domid))
            await store.write(f"{path}/vm", f"/vm/{uuid.uuid4()}")
            for own in ("device", "data"):
                await store.mkdir(f"{path}/{own}")
                await store.set_permissions(f"{path}/{own}", [f"n{domid}"])

        await self._store.transact(write)
        await self._store.introduce(domid)

    async def destroy_domain(self, domid: Domid) -> None:
        """The domain is gone: release it, then remove what was its own, backends' sides too."""
        with suppress(StoreError):  # the daemon releases a domain when its process ends
            await self._store.release(domid)
        for kind in ("vbd3", "vbd"):
            await self._store.remove(f"/local/domain/0/backend/{kind}/{domid}")
        await self._store.remove(f"/local/domain/{domid}")
        await self._store.remove(f"/libxl/{domid}")

    async def attach(self, domid: Domid, disk: DiskLine, *, wait: bool = True) -> int:
        """Attach a disk; its device number.  Raises `AttachFailed` with the backend's reason."""
        backend = _backend_path(domid, disk)
        await self._store.transact(lambda store: _write_device(store, domid, disk))
        if wait:
            try:
                await self._finish_attach(backend)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.detach(domid, disk)
                raise
        return disk.devid

    async def _finish_attach(self, backend: str) -> None:
        if not await self._wait_state(backend, {XenbusState.INIT_WAIT}, INIT_SECONDS):
            raise AttachFailed(
                f"{backend}: no backend answered in {INIT_SECONDS:g} s; is it running?"
            )
        status = await self._store.read(f"{backend}/xbd-status")
        if status != "open":
            reason = await self._store.read(f"{backend}/xbd-error")
            await self._store.write(f"{backend}/hotplug-error", reason or "unknown")
            await self._store.write(f"{backend}/hotplug-status", "error")
            raise AttachFailed(reason or f"{backend}: the disk was not opened")
        await self._store.write(f"{backend}/hotplug-status", "connected")

    async def detach(self, domid: Domid, disk: DiskLine) -> bool:
        """Detach a disk; False if the backend did not close in time and was removed by force."""
        backend = _backend_path(domid, disk)

        async def close(store: StoreReader) -> None:
            state = await store.read(f"{backend}/state")
            if state is not None and state != str(int(XenbusState.CLOSED)):
                await store.write(f"{backend}/online", "0")
                await store.write(f"{backend}/state", str(int(XenbusState.CLOSING)))

        await self._store.transact(close)
        closed = await self._wait_state(
            backend, {XenbusState.CLOSED, XenbusState.UNKNOWN}, DESTROY_SECONDS
        )
        await self._store.remove(backend)
        await self._store.remove(f"/local/domain/{domid}/device/vbd/{disk.devid}")
        await self._store.remove(f"/libxl/{domid}/device/vbd/{disk.devid}")
        return closed

    async def _wait_state(self, backend: str, states: set[XenbusState], seconds: float) -> bool:
        with trio.move_on_after(seconds):
            async with self._store.watch(f"{backend}/state") as watch:
                while True:
                    await watch.changed()
                    text = await self._store.read(f"{backend}/state")
                    if XenbusState(int(text) if text else 0) in states:
                        return True
        return False


def _backend_path(domid: Domid, disk: DiskLine) -> str:
    return f"/local/domain/0/backend/{disk.kind}/{domid}/{disk.devid}"


async def _write_device(store: StoreReader, domid: Domid, disk: DiskLine) -> None:
    backend = _backend_path(domid, disk)
    frontend = f"/local/domain/{domid}/device/vbd/{disk.devid}"
    backend_keys = {
        "frontend": frontend,
        "frontend-id": str(domid),
        "online": "1",
        "removable": "0",
        "bootable": "1",
        "state": str(int(XenbusState.INITIALISING)),
        "dev": disk.vdev,
        "type": disk.kind if disk.kind == "vbd3" else "phy",
        "mode": "r" if disk.read_only else "w",
        "device-type": "disk",
        "params": f"aio:{disk.target}" if disk.kind == "vbd3" else disk.target,
        "script": "/etc/xen/scripts/block-xbd",
    }
    if disk.discard_enable is not None:
        backend_keys["discard-enable"] = str(int(disk.discard_enable))
    frontend_keys = {
        "backend": backend,
        "backend-id": "0",
        "state": str(int(XenbusState.INITIALISING)),
        "virtual-device": str(disk.devid),
        "device-type": "disk",
    }
    for path, keys, permissions in (
        (backend, backend_keys, ["n0", f"r{domid}"]),
        (frontend, frontend_keys, [f"n{domid}", "r0"]),
        (f"/libxl/{domid}/device/vbd/{disk.devid}", backend_keys, ["n0"]),
    ):
        await store.remove(path)
        await store.mkdir(path)
        await store.set_permissions(path, permissions)
        await store.write_all({f"{path}/{key}": value for key, value in keys.items()})
