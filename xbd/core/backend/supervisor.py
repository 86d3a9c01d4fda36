"""All devices of all configured kinds, each in isolation.

A device that fails takes nobody along: whatever leaves its task is logged, unless it means that
nothing can be served any more.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Final

import structlog
import trio

from xbd.core.backend.device import Device, Services
from xbd.core.backend.diagnostics import Diagnostics, DomainLimits, one_line
from xbd.core.backend.failure import is_store_lost, stops_daemon, worst
from xbd.core.backend.identity import DeviceId, parse_devid, parse_domid
from xbd.core.backend.keys import OwnKeys, read_own
from xbd.core.errors import ConfigError, StoreError, StoreLost, XbdError
from xbd.core.units import Domid

SCRIPT_NAME: Final = "block-xbd"
"""The hotplug script that marks a disk as ours."""
_OTHERS_KINDS: Final = ("vbd", "qdisk", "tap")
"""Kinds that other backends serve too: only the script makes a disk in them ours."""
_TAP_DISK: Final = re.compile(r"aio:[a-z0-9][a-z0-9-]*:.*", re.DOTALL)

_log = structlog.get_logger("xbd.backend")


def is_ours(kind: str, own: OwnKeys) -> bool:
    """Whether a directory is marked for us.

    In ``vbd3``, which tapback serves on hosts that have it, a target of the form DRIVER:PATH marks
    it too; in kinds that nobody else knows everything is ours.
    """
    if PurePosixPath(own.script).name == SCRIPT_NAME:
        return True
    if kind in _OTHERS_KINDS:
        return False
    return kind != "vbd3" or bool(_TAP_DISK.fullmatch(own.params))


class Supervisor:
    """Finds devices in XenStore and keeps each one's task."""

    def __init__(self, services: Services, kinds: list[str]) -> None:
        self.devices: dict[DeviceId, Device] = {}
        self._counts: Counter[Domid] = Counter()
        """Devices per domain."""
        self._services = services
        self._store = services.store
        self._kinds = kinds
        self._limits = DomainLimits()
        self._stop = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._unscanned = len(kinds)
        self.scanned = trio.Event()
        """Set once every kind was looked at."""
        self.on_change: Callable[[], None] | None = None
        """Called when devices have come or gone."""

    async def run(self) -> None:
        """Serve until `stop` was called and every device has ended.

        Raises `HypervisorLost`, or `StoreLost` if the store was closed for good.
        """
        async with trio.open_nursery() as watchers:
            async with trio.open_nursery() as devices:
                self._nursery = devices
                for kind in self._kinds:
                    watchers.start_soon(self._watch_kind, kind)
                watchers.start_soon(self._watch_releases)
                await self._stop.wait()
                for device in self.devices.values():
                    device.stop()
            watchers.cancel_scope.cancel()

    def stop(self) -> None:
        """Take no new devices, end those there are."""
        self._stop.set()

    # -- watching ---------------------------------------------------------------------------

    async def _watch_kind(self, kind: str) -> None:
        path = f"{self._services.base}/backend/{kind}"
        first = True
        async with self._store.watch(path) as watch:
            while True:
                changed = await watch.changed()
                try:
                    for place in _places(path, changed):
                        await self._look(kind, place)
                except StoreLost:
                    continue  # the watch fires when it is back
                except StoreError as error:
                    _log.error(f"cannot look at {path}: {error}")
                if first:
                    first = False
                    self._unscanned -= 1
                    if not self._unscanned:
                        self.scanned.set()

    async def _watch_releases(self) -> None:
        """A domain that died may leave its directories as they were: everybody has a look."""
        async with self._store.watch("@releaseDomain") as watch:
            while True:
                await watch.changed()
                for device in self.devices.values():
                    device.ring()

    async def _look(self, kind: str, place: tuple[str, ...]) -> None:
        """At one device, all of a domain's, or all: as far as `place` names them."""
        path = f"{self._services.base}/backend/{kind}"
        domains = place[:1] or await self._store.directory(path) or ()
        for domain in domains:
            domid = parse_domid(domain)
            if domid is None:
                continue
            names = place[1:2] or await self._store.directory(f"{path}/{domain}") or ()
            for name in names:
                devid = parse_devid(name)
                if devid is not None:
                    await self._consider(DeviceId(kind, domid, devid))
        if not place[1:]:
            for device in self.devices.values():
                if device.id.kind == kind and place in ((), (str(device.id.domid),)):
                    device.ring()  # also those that are gone from the tree

    async def _consider(self, device: DeviceId) -> None:
        known = self.devices.get(device)
        if known is not None:
            known.ring()
            return
        if self._stop.is_set() or self._nursery is None:
            return
        own = await read_own(self._store, device.path(self._services.base))
        if own is None or device in self.devices or not is_ours(device.kind, own):
            return
        if own.frontend_id != device.domid:
            _log.error("its frontend-id is another domain's; ignored", device=device.name)
            return
        self._start(device)

    def _start(self, device: DeviceId) -> None:
        assert self._nursery is not None
        diagnostics = Diagnostics(device, self._limits.of(device.domid))
        started = Device(device, self._services, diagnostics, refusal=self._too_many(device))
        self.devices[device] = started
        self._counts[device.domid] += 1
        self._changed()
        self._nursery.start_soon(self._isolated, started)

    def _too_many(self, device: DeviceId) -> ConfigError | None:
        count = self._counts[device.domid]
        limit = self._services.policy.limits.disks_per_domain
        if count < limit:
            return None
        return ConfigError(
            f"domain {device.domid} has {count} disks already, as many as"
            " limits.disks_per_domain in the daemon's configuration allows"
        )

    # -- isolation --------------------------------------------------------------------------

    async def _isolated(self, device: Device) -> None:
        try:
            await device.run()
        except Exception as caught:
            error = worst(caught)
            if stops_daemon(error):
                raise error from None
            if not is_store_lost(caught):
                _log.error(
                    f"the device's task ended: {one_line(error)}",
                    device=device.id.name,
                    exc_info=None if isinstance(error, XbdError) else caught,
                )
        finally:
            del self.devices[device.id]
            self._counts[device.id.domid] -= 1
            if not self._counts[device.id.domid]:
                del self._counts[device.id.domid]
                self._limits.forget(device.id.domid)
            self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()


def _places(root: str, changed: list[str]) -> list[tuple[str, ...]]:
    """Which (domid, devid) the changed paths lie in; a shorter tuple means all below."""
    places: dict[tuple[str, ...], None] = {}
    for path in changed:
        if path == root or not path.startswith(f"{root}/"):
            return [()]
        places[tuple(path[len(root) + 1 :].split("/")[:2])] = None
    return list(places)
