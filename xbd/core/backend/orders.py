"""What an administrator asks of disks in use: ``xbd snapshot``, ``pause``, ``resume``, ``resize``.

Disks are named as ``xbd list`` names them.  All of these raise `ConfigError` for arguments that
make no sense, and `DriverError` for what the disk can't do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import trio

from xbd.core.backend.device import Device
from xbd.core.datapath import Disk
from xbd.core.errors import ConfigError

Order = Callable[[Device, Disk, dict[str, Any]], Awaitable[str]]
"""Carries out an order with these arguments; returns what to say of it in the log."""


async def carry_out(name: str, devices: Iterable[Device], arguments: dict[str, Any]) -> str:
    """One of `ORDERS`.  `arguments` are a control request's: ``disk`` and the order's own."""
    device, disk = _find(devices, arguments.get("disk"))
    return await ORDERS[name](device, disk, arguments)


def _find(devices: Iterable[Device], name: object) -> tuple[Device, Disk]:
    if not isinstance(name, str):
        raise ConfigError('this needs "disk", a text')
    named = [device for device in devices if device.id.name == name]
    if not named:
        raise ConfigError(f"there is no disk {name[:80]!r}: xbd list shows those that there are")
    served = [(device, device.disk) for device in named if device.disk is not None]
    if len(served) != 1:
        problem = "is there more than once" if served else "is not open"
        raise ConfigError(f"{name} {problem}: see xbd list")
    return served[0]


async def _snapshot(device: Device, disk: Disk, arguments: dict[str, Any]) -> str:
    """Keep the disk under a name of its own."""
    name = arguments.get("name")
    if not isinstance(name, str):
        raise ConfigError('a snapshot needs "name", a text')
    await disk.access.create_snapshot(name)
    return f"created snapshot {name!r} of {device.id.name}"


async def _pause(device: Device, disk: Disk, _arguments: dict[str, Any]) -> str:
    """Let the guest wait: see `Disk.pause`."""
    name = device.id.name
    if disk.paused:
        raise ConfigError(f"{name} is paused already")
    if device.emulating:
        raise ConfigError(
            f"{name} is in use by the guest's QEMU, which emulates it, and can't be paused"
        )
    seconds = device.drain_seconds
    with trio.move_on_after(seconds):
        await disk.pause()
        return f"paused {name}"
    left = disk.connection.in_flight if disk.connection is not None else 0
    raise ConfigError(f"{name} is not paused: {left} requests were not finished in {seconds:g} s")


async def _resume(device: Device, disk: Disk, _arguments: dict[str, Any]) -> str:
    """Let the guest go on."""
    if not disk.paused:
        raise ConfigError(f"{device.id.name} is not paused")
    disk.resume()
    return f"resumed {device.id.name}"


async def _resize(device: Device, disk: Disk, arguments: dict[str, Any]) -> str:
    """Change the size, and tell the guest."""
    name, size, shrink = device.id.name, arguments.get("size"), arguments.get("shrink", False)
    if type(size) is not int or type(shrink) is not bool or size <= 0:
        raise ConfigError('resizing needs "size", in bytes, and may have "shrink", true or false')
    old = disk.access.geometry.size
    if size < old and not shrink:
        raise ConfigError(
            f"{name} has {old} bytes: a smaller disk loses what lies behind its new end; "
            "say --shrink if that is meant"
        )
    await disk.resize(size)
    await device.announce_size()
    return f"resized {name} from {old} to {size} bytes"


ORDERS: Final[dict[str, Order]] = {
    "snapshot": _snapshot,
    "pause": _pause,
    "resume": _resume,
    "resize": _resize,
}
