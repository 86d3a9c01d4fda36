"""What ``xbd list`` shows of a device."""

from __future__ import annotations

from typing import Any

from xbd.core.backend.device import Device, disk_text
from xbd.core.backend.keys import shown
from xbd.core.backend.vdev import vdev_name
from xbd.core.blkif.state import XenbusState
from xbd.core.datapath.config import DiskStats
from xbd.core.driver import DiskSpec
from xbd.core.errors import ConfigError


def describe_device(device: Device) -> dict[str, Any]:
    """One device, as JSON has it; sizes in bytes."""
    own, disk = device.own, device.disk
    driver, image = _driver_and_image(disk_text(own)) if own is not None else (None, None)
    frontend = device.frontend
    return {
        "name": device.id.name,
        "kind": device.id.kind,
        "domain": device.id.domid,
        "device": device.id.devid,
        "vdev": (own.dev if own is not None else "") or vdev_name(device.id.devid),
        "driver": driver,
        "image": image,
        "size": disk.access.geometry.size if disk is not None else None,
        "mode": None if own is None else ("rw" if own.writable else "ro"),
        "state": _name(own.state if own is not None else None),
        "frontend_state": _name(device.frontend_state),
        "protocol": frontend.abi.protocol if frontend is not None else None,
        "queues": len(frontend.queues) if frontend is not None else 0,
        "ring_pages": 1 << frontend.ring_order if frontend is not None else 0,
        "nbd": str(device.nbd) if device.nbd is not None else None,
        "data_path": disk.describe() if disk is not None else None,
        "paused": disk is not None and disk.paused,
        "in_flight": _in_flight(device),
        "stats": _stats(disk.stats if disk is not None else DiskStats()),
        "last_error": device.last_error or (disk.stats.last_error if disk is not None else None),
    }


def _name(state: XenbusState | None) -> str | None:
    return None if state is None else state.name.lower()


def _in_flight(device: Device) -> int:
    disk = device.disk
    return 0 if disk is None or disk.connection is None else disk.connection.in_flight


def _driver_and_image(text: str) -> tuple[str | None, str | None]:
    try:
        spec = DiskSpec.parse(text)
    except ConfigError:
        return None, shown(text.partition("?")[0])
    return spec.driver, spec.path


def _stats(stats: DiskStats) -> dict[str, int]:
    return {
        "rd_req": stats.rd_req,
        "wr_req": stats.wr_req,
        "f_req": stats.f_req,
        "ds_req": stats.ds_req,
        "rd_bytes": stats.rd_bytes,
        "wr_bytes": stats.wr_bytes,
        "errors": stats.errors,
    }
